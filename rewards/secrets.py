"""What looks like a secret: by the name of its environment variable, or by the form of its value.

Reward functions print, raise and write files, and what they say ends up in rollouts and reports; so their processes are
started without secrets, but for those that a recipe names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_WORDS = frozenset({
    *("TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"),
    *("KEY", "KEYS", "APIKEY", "AUTH", "PAT"),
})  # fmt: skip
_VALUES = re.compile(
    r"(hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|sk-|AKIA|ASIA|AIza)[A-Za-z0-9_-]{12,}"  # of known services
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]+"  # a JSON web token
    r"|\w[\w+.-]*://[^/\s@]*:[^/\s@]+@.*",  # an address with a password
    re.DOTALL,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret: `HF_TOKEN`, `OPENAI_API_KEY`, `DB_PASSWORD`."""
    return not _WORDS.isdisjoint(name.upper().split("_"))


def is_secret(value: str) -> bool:
    """Whether a text has the form of a key or token of a known service, or is an address with a password in it."""
    return _VALUES.fullmatch(value.strip()) is not None


def without_secrets(environment: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """The variables that another process may see; those named in `keep` always."""
    return {
        name: value
        for name, value in environment.items()
        if name in keep or not (is_secret_name(name) or is_secret(value))
    }
