"""The recipe that a run began with, held against the one that it shall go on with.

Recipes gain keys from version to version. One that a saved recipe lacks is taken as what the code did before there was
the key: its default, unless `_before_the_keys` knows better.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from grpo.config import Config, ConfigError, explain

FREE_TO_CHANGE = (
    *("name", "output_dir", "num_threads", "reward_workers", "reward_timeout", "reward_env"),
    *("max_steps", "max_skipped_steps", "save_steps", "save_total_limit", "stop_timeout", "ddp_timeout"),
    *("max_tokens_per_micro_batch", "activation_recomputation"),  # for want of memory; a matter of rounding
)
"""Keys that a resumed run may change; any other change would make it another run."""
SHOWN = 80
"""Most characters of a value in a message."""
ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A saved recipe and one at hand, by keys with dots, without those that a run may change."""

    filled: Mapping[str, Any]
    """Keys that the saved one lacks, and what they are taken to be."""
    differing: Mapping[str, tuple[Any, Any]]
    """Keys whose values are not the same, there and here; ABSENT in a shape that does not name one."""

    def describe_filled(self) -> str:
        """In one line."""
        return ", ".join(f"{key}: {_shown(value)}" for key, value in self.filled.items())

    def describe_differing(self) -> str:
        """In one line."""
        return "; ".join(
            f"{key}: {_shown(there)} there, {_shown(here)} here" for key, (there, here) in self.differing.items()
        )

    def overrides(self) -> str:
        """What gives the saved values back on the command line; empty where that cannot be said in short."""
        if any(there is ABSENT or len(_written(there)) > SHOWN for there, _ in self.differing.values()):
            return ""
        return shlex.join(f"{key}={_written(there)}" for key, (there, _) in self.differing.items())


def compare(saved: Mapping[str, Any], config: Config) -> Comparison:
    """`saved` is a run's config.yaml as it stands. Raises ConfigError where this version cannot read it."""
    try:
        before = Config.model_validate({**_before_the_keys(saved), **saved}).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(_why_not(error)) from None
    differing = _differences(before, config.model_dump(mode="json"))
    return Comparison(
        filled={key: value for key, value in _missing(saved, before) if key not in FREE_TO_CHANGE},
        differing={key: (there, here) for key, there, here in differing if key not in FREE_TO_CHANGE},
    )


def _before_the_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a run did whose recipe is older than a key, where the key's default does something else."""
    before = {}
    if saved.get("model") or _shape_of(saved).get("n_routed_experts"):
        before["freeze_router"] = False
    if saved.get("dtype") == "bfloat16":
        before["residual_in_fp32"] = False
    return before


def _shape_of(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    match saved:
        case {"base": {"shape": dict(shape)}}:
            return shape
    return {}


def _missing(saved: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in whole.items():
        if key not in saved:
            yield prefix + key, value
        elif isinstance(value, dict) and isinstance(saved[key], dict):
            yield from _missing(saved[key], value, f"{prefix}{key}.")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**there, **here}:
        one, other = there.get(key, ABSENT), here.get(key, ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield prefix + key, one, other


def _written(value: Any) -> str:
    """As YAML takes it, in one line."""
    return json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    text = "nothing" if value is ABSENT else _written(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _why_not(error: ValidationError) -> str:
    unknown = [
        f"{'.'.join(map(str, item['loc']))} ({_shown(item['input'])} there)"
        for item in error.errors()
        if item["type"] == "extra_forbidden"
    ]
    return f"this version knows no {', '.join(unknown)}" if unknown else explain(error, Config)
