"""Writes docs/configuration.md from the models that read a recipe: `python -m tests.grpo.config_page`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Every key of a recipe

Written by `python -m tests.grpo.config_page` from the code that reads recipes. What keys do together is in
[algorithms.md](algorithms.md), [data.md](data.md), [rollouts.md](rollouts.md), [performance.md](performance.md) and
[scaling.md](scaling.md). A key stands in the recipe, or on the command line as `a.b=value`; what a section leaves out
has its default, and `{}` takes all of them. Names without a word are TRL's, or a section's.

| key | default | allowed | what |
| --- | --- | --- | --- |
"""


def page() -> str:
    """All of it."""
    return HEAD + "".join(f"{row}\n" for row in _rows(Config, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        sections = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        what = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_default(field, bool(sections))} | {_allowed(field)} | {what} |"
        for section in sections:
            yield from _rows(section, f"{prefix}{name}.")


def _parts(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) in (Literal, tuple) else (annotation, *get_args(annotation))


def _default(field: FieldInfo, is_section: bool) -> str:
    if field.is_required():
        return "required"
    if is_section:
        return "none" if field.default is None else "its defaults"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(field: FieldInfo) -> str:
    choices = [choice for part in _parts(field.annotation) if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if bool in _parts(field.annotation):
        return "`true`, `false`"
    bounds = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    return " ".join(
        f"{word} {getattr(limit, sign)}"
        for limit in field.metadata
        for sign, word in bounds.items()
        if type(limit).__name__.lower() == sign
    )


if __name__ == "__main__":
    PAGE.write_text(page())
