"""Folders are removed whatever is in them, and nothing outside is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewards.sandbox.cleanup import MAX_DEPTH, is_tree_larger, remove_tree


def test_a_deep_tree_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(str(top))
    assert not top.exists()


def test_closed_folders_and_hostile_names_are_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for name in ("a/b/c", "up-0", "a/up-1", "-rf", "\udcff", "a/ b\n"):
        os.makedirs(top / name, exist_ok=True)
    (top / "a" / "file").write_text("x")
    for name in ("a/b/c", "a/b", "a", "."):
        os.chmod(top / name, 0)
    remove_tree(str(top))
    assert not top.exists()


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir(mode=0o500)
    (tmp_path / "precious").write_text("x")
    top.mkdir()
    (top / "folder").symlink_to(outside)
    (top / "file").symlink_to(tmp_path / "precious")
    remove_tree(str(top))
    assert not top.exists()
    assert (tmp_path / "precious").read_text() == "x"
    assert outside.stat().st_mode & 0o777 == 0o500


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    (tmp_path / "top").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="Not a directory|symbolic"):
        remove_tree(str(tmp_path / "top"))
    assert (tmp_path / "outside" / "file").exists()


def test_a_missing_folder_is_removed_already(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "none"))


def test_size_entries_and_depth_are_each_noticed(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(b"x" * 10_000)
    assert not is_tree_larger(str(tmp_path), most_bytes=1 << 20, most_entries=10)
    assert is_tree_larger(str(tmp_path), most_bytes=50_000, most_entries=10)
    assert is_tree_larger(str(tmp_path), most_bytes=1 << 20, most_entries=9)
    os.makedirs(tmp_path / "/".join("d" * (MAX_DEPTH + 2)))
    assert is_tree_larger(str(tmp_path), most_bytes=1 << 20, most_entries=1000)
