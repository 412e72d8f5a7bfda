"""Attacks that reach for the network, by every family of sockets."""

from tests.rewards.attacks.attack import containment

ATTACKS = [
    containment(
        "tcp-connect",
        """
        import socket
        attempt(lambda: socket.create_connection(('127.0.0.1', @PORT@), 1))
        """,
    ),
    containment(
        "tcp-listen",
        """
        import socket
        def go():
            s = socket.socket()
            s.bind(("127.0.0.1", 0))
            s.listen()
        attempt(go)
        """,
    ),
    containment(
        "udp",
        """
        import socket
        attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))
        """,
    ),
    containment(
        "ipv6",
        """
        import socket
        attempt(lambda: socket.socket(socket.AF_INET6))
        """,
    ),
    containment(
        "raw-socket",
        """
        import socket
        attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
        """,
    ),
    containment(
        "packet-socket",
        """
        import socket
        attempt(lambda: socket.socket(17, socket.SOCK_RAW))
        """,
    ),
    containment(
        "netlink-socket",
        """
        import socket
        attempt(lambda: socket.socket(16, socket.SOCK_RAW))
        """,
    ),
    containment(
        "vsock",
        """
        import socket
        attempt(lambda: socket.socket(40, socket.SOCK_STREAM))
        """,
    ),
    containment(
        "unix-socket",
        """
        import socket
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect("@UNIX_SOCKET@")
        attempt(go)
        """,
    ),
    containment(
        "abstract-socket",
        r"""
        import socket
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect("\0@ABSTRACT_SOCKET@")
        attempt(go)
        """,
    ),
    containment(
        "socketpair-turned-outwards",
        r"""
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        attempt(lambda: a.connect("\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.sendto(b"x", "\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.sendmsg([b"x"], [], 0, "\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.bind("here"))
        """,
    ),
    containment(
        "name-resolution",
        """
        import socket
        attempt(lambda: socket.getaddrinfo('example.com', 80))
        """,
    ),
]
