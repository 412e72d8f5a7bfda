"""Attacks that fill the scratch folder: bytes, files, depth."""

from tests.rewards.attacks.attack import Attack, resource_abuse

ATTACKS: list[Attack] = [
    resource_abuse(
        "disk-one-file",
        """
        with open('big', 'wb') as f:
            for _ in range(1024):
                f.write(b'x' * (1 << 20))
        print('done')
        """,
    ),
    resource_abuse(
        "disk-many-files",
        """
        for i in range(1024):
            with open(f'f{i}', 'wb') as f:
                f.write(b'x' * (1 << 20))
        import time
        time.sleep(0.5)
        print('done')
        """,
    ),
    resource_abuse(
        "disk-fallocate",
        """
        import os
        for i in range(256):
            fd = os.open(f'f{i}', os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(fd, 0, 7 << 20)
            os.close(fd)
        import time
        time.sleep(0.5)
        print('done')
        """,
    ),
    resource_abuse(
        "disk-deleted-files",
        """
        import os
        keep = []
        for i in range(1000):
            f = open(f"f{i}", "wb")
            f.write(b"x" * (4 << 20))
            f.flush()
            os.unlink(f"f{i}")
            keep.append(f)
        print("done")
        """,
    ),
    resource_abuse(
        "inodes",
        """
        for i in range(50_000):
            open(f'f{i}', 'w').close()
        import time
        time.sleep(0.5)
        print('done')
        """,
    ),
    resource_abuse(
        "deep-directories",
        """
        import os
        for _ in range(20_000):
            os.mkdir('d')
            os.chdir('d')
        import time
        time.sleep(0.5)
        print('done')
        """,
    ),
    resource_abuse(
        "closed-directories",
        """
        import os
        os.makedirs('a/b/c')
        os.mkdir('x', 0)
        os.mkdir('a/y', 0)
        open('a/b/f', 'w').close()
        while True:
            pass
        """,
    ),
]
