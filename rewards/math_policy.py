"""What counts as the same answer: the choices that are not mathematics. Each is documented in docs/math-rewards.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MathPolicy:
    """The default is the documented policy; change a field to be stricter."""

    deadline_s: float = 1.0
    """Seconds that the symbolic stage may take before the verdict is `timeout`."""
    memory_mb: int = 512
    """Address space of a symbolic worker, in MiB."""
    use_sympy: bool = True
    """Whether what the own proofs leave open goes to a symbolic worker; if not, it earns nothing."""
    percent_may_drop_sign: bool = True
    """Whether 45 and 45% are the same answer, whichever of them is the gold."""
    unit_may_be_missing: bool = True
    """Whether a bare number is right where the gold has a unit or a degree sign."""

    def __post_init__(self) -> None:
        if self.deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {self.deadline_s}")
        if self.memory_mb < 256:
            raise ValueError(f"memory_mb must be at least 256 (sympy itself needs that), got {self.memory_mb}")
