"""What the interpreter in the jail may read, found in the trainer's process and handed to the zygote."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
_LIBRARY_DIRS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """The interpreter and the files it needs, as real paths."""

    executable: str
    """The interpreter itself, not a virtual environment's link to it."""
    module_path: tuple[str, ...]
    """`sys.path` of the jailed interpreter: the standard library, then the folders of the listed packages."""
    readable: tuple[str, ...]
    """Files and folders that programs may read."""
    packages: tuple[str, ...]
    """Packages imported before the first program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """The files that programs of another language need, as real paths."""

    folders: tuple[str, ...] = ()
    """Compilers and libraries."""
    executables: tuple[str, ...] = ()
    """What a program's own process may execute."""


def find_toolchain(command: str) -> Toolchain:
    """The toolchain of a compiler or interpreter at this real path."""
    prefix = os.path.dirname(os.path.dirname(command))
    parts = ("bin", "lib", "lib64", "libexec", "include", "share/nodejs")
    folders = [f"{place}/{part}" for place in ("/usr", prefix) for part in parts]
    loader = _find_loader(command)
    return Toolchain(folders=_existing(folders), executables=(command, loader) if loader else (command,))


def find_runtime(packages: Sequence[str] = ("numpy",)) -> Runtime:
    """This interpreter's runtime, with those of `packages` that are installed."""
    stdlib = os.path.realpath(os.path.dirname(os.__file__))
    dynamic = os.path.realpath(sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}) or stdlib)
    extensions = os.path.join(stdlib, "lib-dynload")
    readable = [stdlib, dynamic, *_library_dirs(), *_SYSTEM_FILES]
    module_path = [stdlib, extensions]
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        found.append(package)
        folder = os.path.realpath(next(iter(spec.submodule_search_locations)))
        site = os.path.dirname(folder)
        module_path.append(site)
        # Wheels put the shared libraries they bundle beside the package.
        readable += [folder, os.path.join(site, f"{package}.libs")]
    return Runtime(
        executable=os.path.realpath(sys.executable),
        module_path=tuple(dict.fromkeys(module_path)),
        readable=_existing(readable),
        packages=tuple(found),
    )


def _find_loader(command: str) -> str | None:
    """The program that loads this one's shared libraries, as its ELF header names it; None for a script."""
    with open(command, "rb") as file:
        data = file.read(1 << 16)
    if data[:5] != b"\x7fELF\x02":
        return None
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, entries = struct.unpack_from("<HH", data, 54)
    for number in range(entries):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, table + number * entry_size)
        if kind == 3:  # PT_INTERP
            return os.path.realpath(data[offset : offset + size].rstrip(b"\0").decode())
    return None


def _library_dirs() -> list[str]:
    """Where shared libraries lie: the multiarch folders where the distribution has them, else the classic ones."""
    triple = sysconfig.get_config_var("MULTIARCH")
    multiarch = [f"/lib/{triple}", f"/usr/lib/{triple}"] if triple else []
    found = [path for path in multiarch if os.path.isdir(path)] or [
        path for path in _LIBRARY_DIRS if os.path.isdir(path)
    ]
    own = [sysconfig.get_config_var("LIBDIR") or ""]
    return found + [path for path in own if path.startswith(sys.base_prefix) and sys.base_prefix != "/usr"]


def _existing(paths: Iterable[str]) -> tuple[str, ...]:
    """Real paths that exist, without those inside another."""
    real = {os.path.realpath(path) for path in paths if os.path.exists(path)}
    return tuple(sorted(path for path in real if not any(str(parent) in real for parent in Path(path).parents)))
