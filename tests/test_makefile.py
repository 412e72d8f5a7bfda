"""`make` picks a Python that will do, or says which one is needed, and installs once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_make(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs make as a person would, not as part of the make that may run these tests."""
    own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "VENV", "PYTHON", "PIP_ARGS"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PATH"] = path or environment["PATH"]
    command = [shutil.which("make") or "make", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def write_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what installing reads: a project without code and without dependencies."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "constraints.txt").touch()
    (folder / "pyproject.toml").touch()
    return folder


@pytest.fixture
def pip_log(tmp_path: Path) -> Path:
    return tmp_path / "pip.log"


@pytest.fixture
def python(tmp_path: Path, pip_log: Path) -> Path:
    """A Python that passes the check and makes environments that hold itself; its pip only notes what it was asked.

    In `tmp_path`, a file `offline` makes that pip fail, and `killed` makes it kill the shell it runs in.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""
case "$*" in
  *-m\\ venv*) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
  *pip\\ install*)
    echo "$*" >> {pip_log}
    [ ! -e {tmp_path}/offline ] || exit 1
    [ ! -e {tmp_path}/killed ] || kill -9 $PPID ;;
  *) exec {sys.executable} "$@" ;;
esac"""
    return write_program(folder / "python3", script)


def test_a_python_too_old_is_refused_by_name(checkout: Path, tmp_path: Path) -> None:
    old = write_program(tmp_path / "old", 'case "$1" in --version) echo Python 3.8.18;; *) exit 1;; esac')
    answer = run_make("setup", f"PYTHON={old}", cwd=checkout)
    assert answer.returncode != 0
    assert f"PYTHON={old} is Python 3.8.18, but Python 3.11, 3.12 or 3.13 is needed" in answer.stderr
    assert "make setup PYTHON=/path/to/python3.12" in answer.stderr
    assert not (checkout / ".venv").exists()


def test_without_any_python_the_message_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bash").symlink_to(shutil.which("bash") or "")
    answer = run_make("zero", cwd=checkout, path=str(tools))
    assert answer.returncode != 0
    assert "No Python 3.11, 3.12 or 3.13 found" in answer.stderr


def test_an_old_python3_is_passed_over_for_a_newer_one(checkout: Path, python: Path) -> None:
    python.rename(python.with_name("python3.13"))
    write_program(python, "exit 1")
    answer = run_make("setup", cwd=checkout, path=f"{python.parent}:{os.environ['PATH']}")
    assert answer.returncode == 0, answer.stderr
    assert (checkout / ".venv/bin/python").read_text() == python.with_name("python3.13").read_text()


def test_it_installs_once_and_again_when_a_pin_changes(checkout: Path, python: Path, pip_log: Path) -> None:
    for _ in range(2):
        assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
        assert run_make(".venv/.installed", f"PYTHON={python}", cwd=checkout).returncode == 0  # what `zero` needs
    assert len(pip_log.read_text().splitlines()) == 1
    assert "-c constraints.txt -e .[dev]" in pip_log.read_text()

    later = (checkout / ".venv/.installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    (checkout / ".venv/kept").touch()
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
    assert len(pip_log.read_text().splitlines()) == 2
    assert (checkout / ".venv/kept").exists()


def test_an_install_that_was_killed_starts_afresh(checkout: Path, python: Path, tmp_path: Path) -> None:
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
    (checkout / ".venv/half-written").touch()
    (checkout / ".venv/.installed-dev").unlink()
    (tmp_path / "killed").touch()
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode != 0
    assert (checkout / ".venv/half-written").exists()

    (tmp_path / "killed").unlink()
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
    assert not (checkout / ".venv/half-written").exists()


def test_an_install_that_fails_keeps_the_environment(checkout: Path, python: Path, tmp_path: Path) -> None:
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
    (checkout / ".venv/kept").touch()
    (checkout / ".venv/.installed-dev").unlink()
    (tmp_path / "offline").touch()
    answer = run_make("setup", f"PYTHON={python}", cwd=checkout)
    assert answer.returncode != 0
    assert "Nothing was installed; the log is .venv/install.log" in answer.stderr

    (tmp_path / "offline").unlink()
    assert run_make("setup", f"PYTHON={python}", cwd=checkout).returncode == 0
    assert (checkout / ".venv/kept").exists()
