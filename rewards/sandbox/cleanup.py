"""Removing and measuring a folder that a hostile program has filled: any depth, name or mode; links never followed."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat

MAX_DEPTH = 64
"""Folders in folders; a path of thousands takes quadratic time to walk."""


def remove_tree(path: str) -> None:
    """Remove a folder and all in it; nothing may be writing there any more. OSError if something cannot be removed.

    Folders are moved up to the top one before they are emptied, so neither depth nor the length of a path matters.
    """
    try:
        top = _open_folder(path, None)
    except FileNotFoundError:
        return
    try:
        counter = itertools.count()
        while folders := _empty_one_level(top):
            for name in folders:
                _flatten(top, name, counter)
    finally:
        os.close(top)
    os.rmdir(path)


def is_tree_larger(path: str, *, most_bytes: int, most_entries: int) -> bool:
    """Whether a folder, which may be changing, holds more allocated bytes or entries than that, or goes too deep."""
    size, entries = 0, 0
    pending = [(path, 0)]
    while pending:
        folder, depth = pending.pop()
        with contextlib.suppress(OSError), os.scandir(folder) as listing:
            for entry in listing:
                entries += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
                if size > most_bytes or entries > most_entries or depth > MAX_DEPTH:
                    return True
    return False


def _empty_one_level(folder: int) -> list[str]:
    """Unlink all that is no folder; the names of the folders."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def _flatten(top: int, name: str, counter: itertools.count[int]) -> None:
    """Empty one folder in `top`, its own folders becoming its neighbours, and remove it."""
    folder = _open_folder(name, top)
    try:
        for inner in _empty_one_level(folder):
            # Renaming a folder rewrites its "..", which takes write permission on the folder itself.
            _open_up(inner, folder)
            os.rename(inner, _free_name(top, counter), src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _free_name(top: int, counter: itertools.count[int]) -> str:
    while True:
        name = f"up-{next(counter)}"
        try:
            os.stat(name, dir_fd=top, follow_symlinks=False)
        except FileNotFoundError:
            return name


def _open_folder(name: str, parent: int | None) -> int:
    _open_up(name, parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _open_up(name: str, parent: int | None) -> None:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o700 != 0o700:
        os.chmod(name, 0o700, dir_fd=parent)
