"""What a trainer has around it that programs must not reach, and what is looked at afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

SECRET = "GRPO_ATTACK_SECRET_VALUE"


class World:
    """Secrets, open doors and witnesses; a context manager."""

    def __enter__(self) -> World:
        self.folder = tempfile.mkdtemp(prefix="grpo-attacks-")
        os.chmod(self.folder, 0o777)
        secret, self.writable = Path(self.folder, "secret.txt"), Path(self.folder, "writable.txt")
        secret.write_text(SECRET)
        self.writable.write_text("precious")
        os.chmod(secret, 0o644)
        os.chmod(self.writable, 0o666)
        os.environ["GRPO_ATTACK_SECRET"] = SECRET
        self.server = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        unix_path = os.path.join(self.folder, "door")
        self.unix.bind(unix_path)
        os.chmod(unix_path, 0o777)
        self.abstract = socket.socket(socket.AF_UNIX)
        abstract = f"grpo-attack-{os.getpid()}"
        self.abstract.bind(f"\0{abstract}")
        for door in (self.server, self.unix, self.abstract):
            door.listen()
            door.setblocking(False)
        self.before = os.stat(self.writable)
        self.facts = {
            "SECRET_FILE": str(secret),
            "SECRET_DIR": self.folder,
            "WRITABLE_FILE": str(self.writable),
            "HOME": os.path.expanduser("~"),
            "REPOSITORY": str(Path(__file__).resolve().parents[3]),
            "TRAINER_PID": str(os.getpid()),
            "TRAINER_GROUP": str(os.getpgid(0)),
            "PORT": str(self.server.getsockname()[1]),
            "UNIX_SOCKET": unix_path,
            "ABSTRACT_SOCKET": abstract,
        }
        return self

    def __exit__(self, *_: object) -> None:
        for door in (self.server, self.unix, self.abstract):
            door.close()
        del os.environ["GRPO_ATTACK_SECRET"]
        shutil.rmtree(self.folder)

    def fill_in(self, program: str) -> str:
        """The program with this world's facts in it."""
        for name, value in self.facts.items():
            program = program.replace(f"@{name}@", value)
        return program

    def find_traces(self) -> list[str]:
        """What programs have done out here."""
        traces = []
        after = os.stat(self.writable)
        unchanged = ("st_size", "st_mode", "st_uid", "st_mtime_ns", "st_ctime_ns", "st_nlink")
        if any(getattr(after, field) != getattr(self.before, field) for field in unchanged):
            traces.append(f"{self.writable} was touched")
        if sorted(os.listdir(self.folder)) != ["door", "secret.txt", "writable.txt"]:
            traces.append(f"{self.folder} now holds {sorted(os.listdir(self.folder))}")
        for door in (self.server, self.unix, self.abstract):
            try:
                door.accept()
            except BlockingIOError:
                continue
            traces.append(f"someone connected to {door}")
        for folder in ("/tmp", "/dev/shm", "/var/tmp"):
            if os.path.exists(os.path.join(folder, "grpo-attack-was-here")):
                traces.append(f"a file in {folder}")
        return traces


def find_descendants() -> list[int]:
    """Processes under this one, zombies included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    found, pending = [], [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def wait_for_no_descendants(timeout_s: float = 5.0) -> list[int]:
    """Processes still there after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := find_descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
