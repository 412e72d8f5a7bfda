"""Landlock: the file system narrowed to what is listed, TCP denied, signals and abstract sockets kept inside.

The kernel's interface is versioned ("ABI"); what a version lacks is left out and said so in `describe_abi`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from ctypes import create_string_buffer
from dataclasses import dataclass

from rewards.sandbox import linux

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1, 2, 4, 8, 16, 32
_MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = _READ_FILE | _READ_DIR
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
RUN = READ | _EXECUTE
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""Rights that a rule on a single file may carry; the rest are of directories."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One place the program may reach."""

    descriptor: int
    """An O_PATH descriptor of the file or directory."""
    rights: int
    """READ, WRITE or RUN."""
    is_file: bool
    """True for a single file, whose rule may carry the rights of files only."""


def landlock_abi() -> int:
    """The kernel's Landlock version, 1 or more. OSError where there is none or it is off."""
    return linux.call("landlock_create_ruleset", None, 0, 1)


def describe_abi(abi: int) -> str:
    """What this version confines, for the report of levels."""
    parts = ["files"] + (["truncation"] if abi >= 3 else []) + (["TCP"] if abi >= 4 else [])
    parts += ["device ioctl"] if abi >= 5 else []
    parts += ["signals", "abstract sockets"] if abi >= 6 else []
    return f"Landlock ABI {abi}: {', '.join(parts)}"


def open_rule(path: str, rights: int) -> Rule:
    """A rule for `path`, which must exist (OSError else). The caller closes its descriptor."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    return Rule(descriptor=descriptor, rights=rights, is_file=not os.path.isdir(path))


def make_ruleset(rules: Sequence[Rule], abi: int) -> int:
    """A ruleset's descriptor: all that this ABI can deny is denied, but for `rules`. OSError if the kernel refuses."""
    handled = (1 << 13) - 1
    handled |= (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_IOCTL_DEV if abi >= 5 else 0)
    fields = [handled]
    if abi >= 4:
        fields.append(0b11)  # TCP bind and connect
    if abi >= 6:
        fields.append(0b11)  # abstract sockets and signals
    attributes = struct.pack(f"<{len(fields)}Q", *fields)
    ruleset = linux.call(
        "landlock_create_ruleset", create_string_buffer(attributes, len(attributes)), len(attributes), 0
    )
    for rule in rules:
        rights = rule.rights & handled & (_OF_FILES if rule.is_file else -1)
        attribute = create_string_buffer(struct.pack("<Qi", rights, rule.descriptor), 12)
        linux.call("landlock_add_rule", ruleset, 1, attribute, 0)
    return ruleset


def enforce_ruleset(ruleset: int) -> None:
    """Confine the calling thread; no_new_privs must be set."""
    linux.call("landlock_restrict_self", ruleset, 0)
