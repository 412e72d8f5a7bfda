"""docs/design.md held: direction of imports, confinement, sizes, names, safety, and a README and LOG that are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("grpo", "policy", "rewards", "rollouts")
MAX_FILE_LINES = 400  # tables of cases make test files longer
MAX_FUNCTION_LINES = 80


@cache
def tracked_files() -> tuple[str, ...]:
    """Every file that git tracks and that is there, relative to the root, in order."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(sorted(path for path in listing.split("\0") if path and (ROOT / path).is_file()))


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def python_files(*folders: str) -> dict[str, ast.Module]:
    """The tracked Python files below `folders` (everywhere if none is named), parsed."""
    found = {
        path: ast.parse(read(path), path)
        for path in tracked_files()
        if path.endswith(".py") and (not folders or path.partition("/")[0] in folders)
    }
    assert found, f"no Python file below {folders}"
    return found


def expect_none(wrong: Iterable[str]) -> None:
    """All of them in the message, where comparing with an empty list would show one."""
    found = sorted(wrong)
    assert not found, "\n" + "\n".join(found)


# --- imports -----------------------------------------------------------------------------------------------------


def imported_modules(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that `path` imports, inside functions and by `import_module("name")` too."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, level=level):
                base = package[: len(package) - level + 1] if level else ()
                yield node.lineno, ".".join([*base, *([module] if module else [])])
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if called_name(function) in {"import_module", "__import__"}:
                    yield node.lineno, name


def called_name(function: ast.expr) -> str:
    """`f` of both `f(...)` and `a.b.f(...)`."""
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def design_table(first_heading: str) -> list[list[list[str]]]:
    """The rows of the table in docs/design.md that starts with this heading; per cell the names in backquotes."""
    lines = iter(read("docs/design.md").splitlines())
    for line in lines:
        if line.startswith(f"| {first_heading} |"):
            break
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")])
    assert rows, f"docs/design.md has no table that starts with {first_heading!r}"
    return rows


def test_packages_import_in_one_direction_only() -> None:
    may_import = {name: {name, *others} for (name,), others, _ in design_table("package")}
    assert set(may_import) == set(PACKAGES)
    own = {*PACKAGES, "recipes", "benchmarks", "tests"}
    wrong = [
        f"{path}:{line} imports {module}"
        for path, tree in python_files(*PACKAGES).items()
        for line, module in imported_modules(tree, path)
        if (top := module.partition(".")[0]) in own and top not in may_import[path.partition("/")[0]]
    ]
    expect_none(wrong)


def test_the_direction_of_imports_has_no_cycle() -> None:
    left = {name: set(others) for (name,), others, _ in design_table("package")}
    while left:
        leaves = {name for name, others in left.items() if not others & left.keys()}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in leaves}


def test_outside_packages_stay_behind_their_door() -> None:
    doors = {package: globs for packages, globs in design_table("outside package") for package in packages}
    wrong = [
        f"{path}:{line} imports {module}, which belongs in {', '.join(doors[top])}"
        for path, tree in python_files(*PACKAGES).items()
        for line, module in imported_modules(tree, path)
        if (top := module.partition(".")[0]) in doors and not any(fnmatch(path, glob) for glob in doors[top])
    ]
    expect_none(wrong)


def test_all_that_is_imported_is_declared() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name, extra in extras.items() if name != "dev" for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = {"yaml": "pyyaml"}
    undeclared = [
        f"{path}:{line} imports {module}"
        for path, tree in python_files(*PACKAGES).items()
        for line, module in imported_modules(tree, path)
        if (top := module.partition(".")[0]) not in {*sys.stdlib_module_names, *PACKAGES}
        and canonicalize_name(distributions.get(top, top)) not in declared
    ]
    expect_none(undeclared)


def test_importing_rewards_loads_neither_torch_nor_sympy() -> None:
    program = "import sys, rewards; print(sorted({'torch', 'sympy', 'numpy', 'transformers'} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import torch.nn as nn
from ..policy import model
def f():
    from . import types
    import_module("vllm.engine")
"""
    found = [module for _, module in imported_modules(ast.parse(source), "rollouts/deep/engine.py")]
    assert sorted(found) == ["rollouts.deep", "rollouts.policy", "torch.nn", "vllm.engine"]


# --- versions ----------------------------------------------------------------------------------------------------


def test_constraints_pin_what_pyproject_names_to_a_version_it_allows() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    pins = [Requirement(line.partition("#")[0]) for line in read("constraints.txt").splitlines() if line[:1].isalnum()]
    version_of = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(version_of) == len(pins), "a package is pinned twice"
    assert all(re.fullmatch(r"[0-9.]+", version) for version in version_of.values())
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        pinned = version_of.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{line}, but constraints.txt says {pinned}"


# --- sizes and names ---------------------------------------------------------------------------------------------


def lines_of_code(first: int, last: int, lines: list[str], body: list[ast.stmt]) -> int:
    """Lines first..last (1-based) less blank ones and less the docstring that opens `body`."""
    docstring = range(0)
    match body:
        case [ast.Expr(value=ast.Constant(value=str())) as text, *_]:
            docstring = range(text.lineno, (text.end_lineno or text.lineno) + 1)
    return sum(bool(lines[n - 1].strip()) and n not in docstring for n in range(first, last + 1))


def test_files_and_functions_are_short() -> None:
    long = []
    for path, tree in python_files().items():
        lines = read(path).splitlines()
        length = lines_of_code(1, len(lines), lines, tree.body)
        if length > MAX_FILE_LINES and not path.startswith("tests/"):
            long.append(f"{path}: {length} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = lines_of_code(node.lineno, node.end_lineno or node.lineno, lines, node.body)
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    expect_none(long)


def test_blank_lines_and_docstrings_do_not_count_as_code() -> None:
    source = 'def f(x):\n    """One\n    two."""\n\n    y = x\n    # why\n    return y\n'
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert lines_of_code(1, 7, source.splitlines(), function.body) == 4


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = re.compile(r"(^|/|_)(utils?|helpers?|common|misc)(_|/|\.py$)")
    expect_none(path for path in tracked_files() if drawers.search(path))


def test_no_path_of_somebodys_own_machine_is_in_the_tree() -> None:
    own_path = re.compile(r"(?<![\w.)])/(work|home/\w+|Users/\w+|tmp/venv)/")
    wrong = []
    for path in tracked_files():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:
            lines = content.decode().splitlines()
            wrong += [f"{path}:{n} {found[0]}" for n, line in enumerate(lines, 1) if (found := own_path.search(line))]
    expect_none(wrong)


# --- safety ------------------------------------------------------------------------------------------------------


def files_allowed(deed: str) -> set[str]:
    """Where docs/design.md allows `exec` or a broad `except`."""
    return {file for (file,), deeds, _ in design_table("file") if deed in deeds}


OBJECT_MESSAGES = ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
"""How torch.distributed's functions begin that send objects; they end in `_object` or `_object_list`."""


def unsafe_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and reason of whatever would run text or unpickle bytes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = called_name(node.func), {k.arg: k.value for k in node.keywords}
        is_torch = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"
        is_builtin = isinstance(node.func, ast.Name) and name in {"eval", "exec"}
        if is_builtin or name in {"parse_expr", "sympify", "read_pickle", "unsafe_load"}:
            yield node.lineno, f"calls {name}"
        elif name.endswith(("_object", "_object_list")) and name.startswith(OBJECT_MESSAGES):
            yield node.lineno, f"calls {name}, whose messages are unpickled"
        elif is_torch and name in {"load", "save"}:
            yield node.lineno, f"calls torch.{name}, which is pickle's"
        for keyword in ("trust_remote_code", "allow_pickle"):
            if is_true(keywords.get(keyword)):
                yield node.lineno, f"sets {keyword}=True"


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def wall_clocks(tree: ast.Module) -> Iterator[int]:
    """Lines that ask what time it is; that clock jumps, so no duration or deadline may come from it."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=function):
                asked = ast.unparse(function).removeprefix("datetime.")
                if asked in {
                    "time.time",
                    "time.time_ns",
                    "datetime.now",
                    "datetime.utcnow",
                    "date.today",
                    "time.clock",
                }:
                    yield node.lineno
            case ast.ImportFrom(module="time", names=names):
                if {"time", "time_ns"} & {alias.name for alias in names}:
                    yield node.lineno


def test_durations_and_deadlines_are_of_the_monotonic_clock() -> None:
    trees = python_files(*PACKAGES)
    expect_none(f"{path}:{line}" for path in trees for line in wall_clocks(trees[path]))


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("time.time()", True),
        ("from time import time", True),
        ("datetime.datetime.now()", True),
        ("time.monotonic()", False),
        ("from time import perf_counter, monotonic", False),
        ("datetime.date(2020, 1, 2)", False),
    ],
)
def test_wall_clocks_are_recognised(source: str, is_refused: bool) -> None:
    assert bool(list(wall_clocks(ast.parse(source)))) is is_refused


def broad_excepts(tree: ast.Module) -> Iterator[int]:
    """Lines of the handlers that go on after any error at all."""
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=caught, body=body):
                kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
                names = {"Exception" if kind is None else called_name(kind) for kind in kinds}
                if names & {"Exception", "BaseException"} and not ends_there(body[-1]):
                    yield node.lineno
            case ast.Call(func=function, args=kinds) if called_name(function) == "suppress":
                if {called_name(kind) for kind in kinds} & {"Exception", "BaseException"}:
                    yield node.lineno


def ends_there(last: ast.stmt) -> bool:
    """A bare `raise`, or `os._exit(...)` in a forked child."""
    match last:
        case ast.Raise(exc=None):
            return True
        case ast.Expr(value=ast.Call(func=function)):
            return ast.unparse(function) == "os._exit"
    return False


def test_nothing_is_evaluated_or_unpickled() -> None:
    pickles = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    wrong = []
    for path, tree in python_files(*PACKAGES, "benchmarks", "recipes").items():
        allowed = {"calls exec"} if path in files_allowed("exec") else set()
        wrong += [f"{path}:{line} {reason}" for line, reason in unsafe_calls(tree) if reason not in allowed]
        wrong += [f"{path}:{n} imports {name}" for n, name in imported_modules(tree, path) if name in pickles]
    expect_none(wrong)


def test_no_error_is_swallowed_unseen() -> None:
    trees = python_files(*PACKAGES, "benchmarks", "recipes")
    elsewhere = trees.keys() - files_allowed("except")
    expect_none(f"{path}:{line}" for path in elsewhere for line in broad_excepts(trees[path]))


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("eval(text)", True),
        ("exec(text, {})", True),
        ("model.eval()", False),
        ("spec.loader.exec_module(module)", False),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", True),
        ("torch.save(weights, path)", True),
        ("dist.all_gather_object(parts, own)", True),
        ("dist.all_gather(parts, own)", False),
        ("sympy.parsing.sympy_parser.parse_expr(text)", True),
        ("numpy.load(path, allow_pickle=True)", True),
        ("AutoTokenizer.from_pretrained(path, trust_remote_code=True)", True),
    ],
)
def test_unsafe_calls_are_recognised(source: str, is_refused: bool) -> None:
    assert bool(list(unsafe_calls(ast.parse(source)))) is is_refused


@pytest.mark.parametrize(
    ("handler", "is_refused"),
    [
        ("except: pass", True),
        ("except Exception: log()", True),
        ("except (OSError, builtins.BaseException) as error: raise Wrapped from error", True),
        ("except BaseException:\n  close()\n  raise", False),
        ("except BaseException:\n  os._exit(1)", False),
        ("except Exception:\n  raise\n  close()", True),
        ("except (OSError, ValueError): pass", False),
    ],
)
def test_broad_excepts_are_recognised(handler: str, is_refused: bool) -> None:
    assert bool(list(broad_excepts(ast.parse(f"try: f()\n{handler}")))) is is_refused


# --- what people read --------------------------------------------------------------------------------------------


def test_every_recipe_is_a_valid_config() -> None:
    recipes = [path for path in tracked_files() if fnmatch(path, "recipes/*.y*ml") and "/accelerate/" not in path]
    if not recipes:
        pytest.skip("no recipe yet")
    from grpo.config import load_config

    for path in recipes:
        load_config(ROOT / path, overrides=[])


def tree_entries(readme: str) -> list[tuple[str, str]]:
    """Path and description of each line of the README's fenced block that lists the tree."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        entries = [re.fullmatch(r"(\S+)\s{2,}(\S.*)", line) for line in block.splitlines() if line.strip()]
        if any(line.startswith("policy/") for line in block.splitlines()):
            assert all(entries), "each line of the tree is `path  what it is`, with two spaces or more between"
            return [(entry[1], entry[2]) for entry in entries if entry]
    return []


def untrue_entries(entries: list[tuple[str, str]], files: list[str]) -> list[str]:
    """How the listed tree differs from `files`.

    A folder's line (it ends in /) stands for its files that are not source; of `tests/` and dot folders, for all.
    """
    listed = [path for path, _ in entries]
    folders = tuple(path for path in listed if path.endswith("/"))
    wrong = [f"{path}: listed {count} times" for path, count in Counter(listed).items() if count > 1]
    wrong += [f"{path}: no such file" for path in listed if path not in files and path not in folders]
    wrong += [f"{folder}: no file in it" for folder in folders if not any(file.startswith(folder) for file in files)]
    for file in sorted(set(files) - set(listed)):
        is_source = file.endswith((".py", ".yaml", ".yml", ".sh", ".md")) and not file.startswith(("tests/", "."))
        if is_source or "/" not in file or not file.startswith(folders):
            wrong.append(f"{file}: not listed")
    return wrong


def test_the_tree_in_the_readme_is_true() -> None:
    entries = tree_entries(read("README.md"))
    assert entries, "README.md has no fenced block that lists the tree"
    files = [path for path in tracked_files() if (ROOT / path).stat().st_size]  # an empty marker needs no explanation
    expect_none(untrue_entries(entries, files))


def test_an_untrue_tree_is_recognised() -> None:
    readme = "```\nMakefile    the commands\npolicy/a.py    one\ngrpo/templates/    the page\ntests/  mirror\n```\n"
    entries = tree_entries(readme)
    files = ["Makefile", "policy/a.py", "grpo/templates/page.css", "tests/policy/test_a.py"]
    assert untrue_entries(entries, files) == []
    assert untrue_entries(entries, [*files, "policy/b.py"]) == ["policy/b.py: not listed"]
    assert untrue_entries(entries, [*files, "LICENSE"]) == ["LICENSE: not listed"]
    assert untrue_entries(entries, files[1:]) == ["Makefile: no such file"]
    assert untrue_entries([*entries, ("policy/a.py", "two")], files) == ["policy/a.py: listed 2 times"]


def commands(text: str) -> list[str]:
    """Of what is set as code in Markdown, fenced or in backquotes, the lines that are commands of ours."""
    code = "\n".join(
        fenced or inline for fenced, inline in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    )
    programs = r"make|grpo|python3?|accelerate|pytest|\S+/bin/\w+"
    return re.findall(rf"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:{programs}) \S.*$", code, re.MULTILINE)


def test_commands_are_recognised() -> None:
    text = "make sure\n`make bench`, `grpo/loss.py`\n```bash\n# three seeds\nSEED=1 grpo train a.yaml\n```\n"
    assert commands(text) == ["make bench", "SEED=1 grpo train a.yaml"]


def test_every_dated_section_of_the_log_says_how_to_get_its_figures() -> None:
    sections = re.split(r"^## ", read("LOG.md"), flags=re.MULTILINE)[1:]
    dated = [section for section in sections if re.search(r"\d{4}-\d{2}-\d{2}", section.splitlines()[0])]
    assert dated, "LOG.md has no section with a date in its heading"
    expect_none(section.splitlines()[0] for section in dated if not commands(section))
