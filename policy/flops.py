"""Operations that a policy does for packed rows: a multiplication and an addition for every weight that a token meets,
and for every pair of a token and one that it attends to.

The count of "model FLOP utilisation" (PaLM, appendix B; of causal attention the half that is needed): what the model
asks for, however it is computed. What recomputation repeats does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policy.config import PolicyConfig
from policy.lora import LoraConfig
from policy.parameter_count import ParameterCount, count_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Of one shape, with or without adapters."""

    config: PolicyConfig
    parameters: ParameterCount

    @classmethod
    def of(cls, config: PolicyConfig, lora: LoraConfig | None = None) -> Flops:
        """Raises LoraError where `lora` names no layer of the shape."""
        return cls(config=config, parameters=count_parameters(config, lora))

    def forward(self, lengths: Iterable[int]) -> float:
        """Of one forward pass over rows of these lengths, logits after every token included."""
        tokens, pairs = self._count(lengths)
        return 2 * self.parameters.met * tokens + self._attention * pairs

    def training(self, lengths: Iterable[int]) -> float:
        """Of one forward and backward pass; frozen weights get no gradient, so that they cost 4 and not 6 a token."""
        tokens, pairs = self._count(lengths)
        return (4 * self.parameters.met + 2 * self.parameters.met_trained) * tokens + 3 * self._attention * pairs

    @property
    def _attention(self) -> int:
        """Operations for a pair of tokens in all layers: a score, and a share of a value."""
        config = self.config
        value = config.v_head_dim if config.family.attention == "latent" else config.head_dim
        return 2 * config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + value)

    @staticmethod
    def _count(lengths: Iterable[int]) -> tuple[int, int]:
        tokens = pairs = 0
        for length in lengths:
            tokens += length
            pairs += length * (length + 1) // 2
        return tokens, pairs
