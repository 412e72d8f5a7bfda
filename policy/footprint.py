"""What a training pass needs of memory, worked out from the shape alone: what autograd keeps, and the most at once.

A list for each kind of layer says what the backward pass finds of it, in bytes a token. These lists follow the code
that makes the tensors; tests compare them with what is really held. With `activation_recomputation`, a layer keeps

    none         all of its list
    selective    its list without what is made again (norms' outputs, activations, sorted tokens, MLA's keys and values)
    full         its input, C numbers a token; and while the backward pass is in a layer, all of that layer's list

The most at once comes while the head's backward pass runs, everything still kept; or, where little is kept, later in
the trunk, when gradients of weights have come together. `peak_of_pass` looks at both.

Shapes: N packed tokens, S longest row, C model width, H query heads, G key-value heads, Q query and key width, V value
width, R latent width, P rotated width, I inner width, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from policy.attention import SHORT_ROW
from policy.config import PolicyConfig
from policy.head import MAX_ELEMENTS, MIN_SLICE
from policy.linear import LANES
from policy.lora import LoraConfig
from policy.parameter_count import ParameterCount, count_parameters
from policy.recompute import Recomputation


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSize:
    """What a pass is made of."""

    num_tokens: int
    """N, prompts and padding included."""
    longest: int
    """S, tokens of the longest row."""
    itemsize: int
    """Bytes of a number that the policy computes with: 2 or 4."""
    residual_in_fp32: bool = True
    """Whether the trunk's residual stream takes 4 bytes a number whatever `itemsize` is."""
    is_gpu: bool
    """Whether the pass is on a GPU; a CPU keeps more of attention, and in bf16 of all else."""
    has_tiles: bool = False
    """Whether a CPU's update takes the kernels of one thread (`policy.linear.has_tiles`)."""
    is_ragged: bool = True
    """Whether rows are of unequal length, as completions mostly are."""
    recomputation: Recomputation = "none"
    lora: LoraConfig | None = None
    num_ahead: int = 0
    """MTP modules that are trained along."""
    is_truncated: bool = False
    """Whether log-probabilities are those within top-k, top-p or min-p (grpo/support.py)."""

    @property
    def has_kernels(self) -> bool:
        """Whether what lies between products is done by kernels, which keep nothing but their inputs."""
        return self.is_gpu or self.itemsize == 4

    @property
    def attends_unpadded(self) -> bool:
        """Whether attention keeps queries, keys and values as they come: on a CPU, that of policy/cpu_attention.py."""
        return self.is_gpu or (self.itemsize == 4 and self.longest <= SHORT_ROW)

    @property
    def stream_itemsize(self) -> int:
        """Bytes of a number of the residual stream."""
        return 4 if self.residual_in_fp32 else self.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Something of a layer that the backward pass needs."""

    name: str
    bytes_per_token: float
    is_remade: bool = False
    """Whether `selective` makes it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPeak:
    """The moment of a forward and backward pass at which most is held, beside the weights; in bytes."""

    activations: int
    """Kept for the backward pass, the final hidden states included."""
    head: int
    """Logits of a slice of the vocabulary, their gradients, and those of the hidden states."""
    working: int
    """What the backward pass of a layer makes and drops again; 0 where the most comes in the head."""
    gradients: int
    """Of weights, in the policy's dtype, that are there by then."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.head + self.working + self.gradients


def layer_pieces(config: PolicyConfig, layer: int, size: PassSize) -> list[Piece]:
    """What the backward pass needs of one layer without recomputation."""
    if config.family.attention == "latent":
        pieces = _latent_attention(config, size)
    else:
        pieces = _grouped_query_attention(config, size)
    if layer == 0 and size.lora is not None:
        # With a frozen embedding, no gradient goes through the first norm; its output may be made again all the same.
        remade_from = size.stream_itemsize * config.hidden_size if size.recomputation == "selective" else 0
        pieces[0] = Piece(name="attention's norm", bytes_per_token=remade_from)
    return pieces + (_experts(config, size) if config.is_moe_layer(layer) else _feed_forward(config, size))


def kept_bytes(config: PolicyConfig, size: PassSize) -> int:
    """Bytes that the trunk's forward pass leaves for the backward pass, the final hidden states included."""
    per_layer = [_kept_of_layer(config, layer, size) for layer in range(config.num_hidden_layers)]
    return round(size.num_tokens * (sum(per_layer) + _kept_around(config, size)))


def inference_bytes(config: PolicyConfig, size: PassSize) -> int:
    """Bytes that a layer holds at once in a pass without gradients, where it holds most."""
    b, width, pairs = size.itemsize, config.hidden_size, config.num_experts_per_tok
    heads = config.num_attention_heads * (2 * config.qk_head_dim + 2 * (config.v_head_dim or config.head_dim))
    inner = (3 if size.is_gpu else 4) * config.intermediate_size
    if config.num_moe_layers:
        inner = max(inner, pairs * (2 * width + 3 * config.moe_intermediate_size))
    return size.num_tokens * b * (3 * width + max(heads, inner))


def peak_of_pass(config: PolicyConfig, size: PassSize, parameters: ParameterCount | None = None) -> PassPeak:
    """The most that log-probabilities of all tokens and their backward pass hold at once, beside the weights.

    `parameters` are those of the same shape and adapters, where they have been counted already.
    """
    parameters = parameters or count_parameters(config, size.lora)
    num_tokens, itemsize, width = size.num_tokens, size.itemsize, config.hidden_size
    kept = [num_tokens * _kept_of_layer(config, layer, size) for layer in range(config.num_hidden_layers)]
    around = num_tokens * _kept_around(config, size)
    table = parameters.embedding * itemsize
    # Hidden states before the wanted tokens; ids, masks and numbers a token; and all of the MTP modules.
    scored = num_tokens * (itemsize * width + 48 + size.num_ahead * _ahead_bytes(config, size))
    moments = [
        PassPeak(
            activations=round(sum(kept) + around + scored),
            head=_head_bytes(config, size),
            working=0,
            gradients=table,
        )
    ]
    done = 0
    for layer in reversed(range(config.num_hidden_layers)):
        own = num_tokens * sum(piece.bytes_per_token for piece in layer_pieces(config, layer, size))
        moments.append(
            PassPeak(
                activations=round(sum(kept[:layer]) + num_tokens * size.stream_itemsize * width
                                  + (own if size.recomputation == "full" else kept[layer])),
                head=0,
                working=round(num_tokens * _working_bytes(config, layer, size)),
                gradients=table + done,
            )
        )  # fmt: skip
        done += parameters.layers[layer] * itemsize
    # The embedding's gradient comes beside the head's, where the two are one tensor.
    last = 2 * table + done
    moments.append(PassPeak(activations=num_tokens * size.stream_itemsize * width, head=0, working=0, gradients=last))
    return max(moments, key=lambda moment: moment.total)


def _kept_of_layer(config: PolicyConfig, layer: int, size: PassSize) -> float:
    """Bytes a token, under the size's recomputation."""
    if size.recomputation == "full":
        experts = 8 * config.num_experts_per_tok if config.is_moe_layer(layer) else 0
        return size.stream_itemsize * config.hidden_size + experts
    pieces = layer_pieces(config, layer, size)
    return sum(piece.bytes_per_token for piece in pieces if not (piece.is_remade and size.recomputation == "selective"))


def _kept_around(config: PolicyConfig, size: PassSize) -> float:
    """Bytes a token: angles, the final norm and what it gives, and the experts chosen, put together."""
    final = _stream_norm(config, size, "final norm").bytes_per_token + size.itemsize * config.hidden_size
    experts = 8 * config.num_moe_layers * config.num_experts_per_tok
    return final + 4 * config.rope_width + experts + 16


def _ahead_bytes(config: PolicyConfig, size: PassSize) -> float:
    """Bytes a token that an MTP module keeps, which recomputation leaves alone, as it does the residual's dtype."""
    size = replace(size, residual_in_fp32=False)
    block = sum(piece.bytes_per_token for piece in layer_pieces(config, config.num_hidden_layers, size))
    norms = 3 * _norm(config.hidden_size, size).bytes_per_token
    return block + norms + 4 * size.itemsize * config.hidden_size


def _head_bytes(config: PolicyConfig, size: PassSize) -> int:
    """The head's backward pass: see policy/head.py."""
    num_tokens, vocabulary = size.num_tokens, config.vocab_size
    hidden_grad = 4 * num_tokens * config.hidden_size
    if size.is_truncated:
        # Seven tensors of a chunk's logits and two masks; the head, and its gradient, in fp32.
        return 30 * min(MAX_ELEMENTS, num_tokens * vocabulary) + 8 * vocabulary * config.hidden_size
    if not size.is_gpu and num_tokens * vocabulary <= MAX_ELEMENTS:
        # Log-softmax, probabilities, their product, and two gradients; in bf16, operands widened to fp32.
        widened = 4 * config.hidden_size * (num_tokens + vocabulary) if size.itemsize < 4 else 0
        return 5 * 4 * num_tokens * vocabulary + widened
    fitting = max(MIN_SLICE, MAX_ELEMENTS // max(1, num_tokens))
    width = min(1 << (fitting.bit_length() - 1), vocabulary)
    # On a CPU the formula is written out: three more tensors of the logits' size.
    at_once = num_tokens * width * (4 + size.itemsize + (0 if size.is_gpu else 3 * 4))
    return at_once + hidden_grad


def _working_bytes(config: PolicyConfig, layer: int, size: PassSize) -> float:
    """Bytes a token that a layer's backward pass makes beside what is kept: gradients around the widest product."""
    b, width = size.itemsize, config.hidden_size
    remade = size.recomputation == "selective"
    if not size.is_gpu and size.longest > SHORT_ROW and config.family.attention == "latent":
        return b * config.num_attention_heads * size.longest  # attention's weights, written out
    again = 1 if size.recomputation == "full" else 0  # the output, made again
    if not config.is_moe_layer(layer):
        return b * ((1 + again) * width + (3 if remade else 2) * config.intermediate_size)
    pairs, inner = config.num_experts_per_tok, config.moe_intermediate_size
    return b * ((2 + again) * width + pairs * (width + (2 * inner if remade else 0)))


def _stream_norm(config: PolicyConfig, size: PassSize, name: str) -> Piece:
    """An RMSNorm of the residual stream."""
    width = config.hidden_size
    if size.stream_itemsize == size.itemsize:
        return _norm(width, size, name)
    if size.is_gpu:
        return Piece(name=name, bytes_per_token=4 * width)
    numbers = width if size.lora is not None else 2 * width
    return Piece(name=name, bytes_per_token=4 * numbers + 4)


def _norm(width: int, size: PassSize, name: str = "norm", input_width: int | None = None) -> Piece:
    """An RMSNorm: its input (`input_width`: of the tensor that this is a view of), on a GPU and a number; a CPU in bf16
    an fp32 copy, with the normalised input.
    """
    own = input_width or width
    if size.has_kernels:
        return Piece(name=name, bytes_per_token=size.itemsize * own + (4 if size.is_gpu else 0))
    numbers = width if size.lora is not None else 2 * width
    # What makes the output again starts from another tensor than the fp32 copy that is kept.
    again = size.itemsize * own if size.recomputation == "selective" else 0
    return Piece(name=name, bytes_per_token=4 * numbers + 4 + again)


def _input(name: str, width: int, size: PassSize, layers: tuple[str, ...], *, is_remade: bool = False) -> list[Piece]:
    """The input of linear layers, which their weights' gradients need: not where all are frozen."""
    if not _is_trained(size, layers):
        return []
    return [Piece(name=name, bytes_per_token=size.itemsize * width, is_remade=is_remade)]


def _is_trained(size: PassSize, layers: tuple[str, ...]) -> bool:
    if size.lora is None:
        return True
    return bool(layers if size.lora.target_modules == "all-linear" else {*layers} & {*size.lora.target_modules})


def _adapters(size: PassSize, layers: tuple[str, ...]) -> list[Piece]:
    """Numbers between the two matrices of each adapter, and their output before it is scaled."""
    if size.lora is None:
        return []
    count = sum(_is_trained(size, (layer,)) for layer in layers)
    return [Piece(name="adapters", bytes_per_token=size.itemsize * size.lora.r * count)]


def _attended(size: PassSize, heads: int, key: int, value: int) -> list[Piece]:
    """What softmax attention keeps beside queries, keys and values: its output, and one number a head or, on a CPU
    where rows are short, its weights.
    """
    b, longest = size.itemsize, size.longest
    if size.is_gpu:
        # FlashAttention's output is as wide as keys; what the next product takes of it is a copy.
        width = key + value if size.is_ragged and value < key else value
        return [Piece(name="attended", bytes_per_token=heads * (b * width + 4))]
    pieces = _input("attended", heads * value, size, ("o_proj",))
    if longest <= SHORT_ROW and size.has_tiles and b == 4 and key % LANES == value % LANES == 0:
        weights = heads * 8  # two numbers of each softmax
    elif longest <= SHORT_ROW:
        weights = heads * longest * (4 if b == 4 else 6)
    elif key == value:
        return [Piece(name="attended", bytes_per_token=heads * (b * value + 4))]
    else:  # no fused kernel takes this: torch writes the formula out, on scaled copies of queries and keys
        weights = heads * b * (longest + 2 * key)
    return [*pieces, Piece(name="attention's weights", bytes_per_token=weights)]


def _padded(numbers: int, size: PassSize) -> list[Piece]:
    """Queries, keys and values, once more where rows of unequal length are padded."""
    copies = 2 if size.is_ragged and not size.attends_unpadded else 1
    return [Piece(name="queries, keys, values", bytes_per_token=size.itemsize * numbers * copies)]


def _grouped_query_attention(config: PolicyConfig, size: PassSize) -> list[Piece]:
    """policy/grouped_attention.py."""
    heads, groups, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pieces = [
        _stream_norm(config, size, "attention's norm"),
        *_input("normed", config.hidden_size, size, ("q_proj", "k_proj", "v_proj"), is_remade=True),
    ]
    if config.family.has_qk_norm:
        one = _norm(head, size)
        pieces.append(Piece(name="query and key norms", bytes_per_token=(heads + groups) * one.bytes_per_token))
    pieces += [*_padded((heads + 2 * groups) * head, size), *_attended(size, heads, head, head)]
    return pieces + _adapters(size, ("q_proj", "k_proj", "v_proj", "o_proj"))


def _latent_attention(config: PolicyConfig, size: PassSize) -> list[Piece]:
    """policy/latent_attention.py; keys and values of all heads are made again from the latent under `selective`."""
    b, heads, rank = size.itemsize, config.num_attention_heads, config.kv_lora_rank
    key, value = config.qk_head_dim, config.v_head_dim
    down = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")
    pieces = [
        _stream_norm(config, size, "attention's norm"),
        *_input("normed", config.hidden_size, size, down, is_remade=True),
    ]
    if config.q_lora_rank is not None:
        pieces.append(_norm(config.q_lora_rank, size, "queries' latent norm"))
        pieces += _input("queries' latent", config.q_lora_rank, size, ("q_b_proj",))
    pieces.append(_norm(rank, size, "latent norm", input_width=config.cache_width))
    pieces += _input("latent", rank, size, ("kv_b_proj",), is_remade=True)
    if size.is_gpu:
        # Values are part of what keys are made of; FlashAttention's are filled up to the width of keys.
        is_filled = size.is_ragged and value < key
        values = heads * (key if is_filled else config.qk_nope_head_dim + value)
        pieces += [
            Piece(name="queries", bytes_per_token=b * heads * key),
            Piece(name="keys", bytes_per_token=b * heads * key, is_remade=True),
            Piece(name="values", bytes_per_token=b * values, is_remade=not is_filled),
        ]
    elif size.attends_unpadded:  # values are part of what keys are made of
        pieces += [
            Piece(name="queries", bytes_per_token=b * heads * key),
            Piece(name="keys", bytes_per_token=b * heads * key, is_remade=True),
            Piece(name="values", bytes_per_token=b * heads * (config.qk_nope_head_dim + value), is_remade=True),
        ]
    else:  # of keys and values, copies in the order of heads, which nothing makes again
        both = b * heads * (key + value)
        pieces += [*_padded(heads * key, size), Piece(name="keys and values", bytes_per_token=both)]
        if size.is_ragged:
            pieces.append(Piece(name="keys and values before padding", bytes_per_token=both, is_remade=True))
    pieces += _attended(size, heads, key, value)
    names = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    return pieces + _adapters(size, (*names, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))


def _feed_forward(config: PolicyConfig, size: PassSize) -> list[Piece]:
    """policy/moe.py, `FeedForward`; in a model with experts, adapters leave dense layers frozen too."""
    names = ("gate_proj", "up_proj", "down_proj") if size.lora is None or not config.num_moe_layers else ()
    return [
        _stream_norm(config, size, "feed-forward's norm"),
        *_input("normed", config.hidden_size, size, names[:2], is_remade=True),
        *_swiglu(config.intermediate_size, size, names[2:]),
        *_adapters(size, names),
    ]


def _swiglu(inner: int, size: PassSize, down: tuple[str, ...]) -> list[Piece]:
    """Gate and up; without kernels silu(gate) too; and their product."""
    numbers = (2 if size.has_kernels else 3) * inner
    pieces = [Piece(name="gate and up", bytes_per_token=size.itemsize * numbers)]
    return pieces + _input("activated", inner, size, down, is_remade=True)


def _experts(config: PolicyConfig, size: PassSize) -> list[Piece]:
    """policy/moe.py, `MixtureOfExperts`; adapters leave it frozen."""
    b, width, pairs = size.itemsize, config.hidden_size, config.num_experts_per_tok
    inner, shared = config.moe_intermediate_size, config.n_shared_experts * config.moe_intermediate_size
    is_frozen = size.lora is not None
    pieces = [_stream_norm(config, size, "feed-forward's norm")]
    if not is_frozen or (size.is_gpu or b < 4):  # our router's own product keeps its input, frozen or not
        pieces.append(Piece(name="normed", bytes_per_token=b * width, is_remade=True))
    # Chosen experts and their order (kernels: and its inverse), int64; scores of all, and the weights of the chosen.
    orders = 3 if size.has_kernels else 2
    pieces.append(Piece(name="routing", bytes_per_token=4 * config.n_routed_experts + pairs * (8 * orders + 2 * 4) + 4))
    if not is_frozen:
        pieces.append(Piece(name="sorted tokens", bytes_per_token=b * pairs * width, is_remade=True))
    pieces.append(
        Piece(name="experts' gate and up", bytes_per_token=b * pairs * inner * (2 if size.has_kernels else 3))
    )
    if not is_frozen:
        pieces.append(Piece(name="experts' activated", bytes_per_token=b * pairs * inner, is_remade=True))
    # Without kernels they are put back in the order of tokens before they are mixed.
    pieces.append(Piece(name="experts' outputs", bytes_per_token=b * pairs * width * (1 if size.has_kernels else 2)))
    if shared:
        numbers = (2 if size.has_kernels else 3) * shared
        pieces.append(Piece(name="shared gate and up", bytes_per_token=b * numbers))
        if not is_frozen:
            pieces.append(Piece(name="shared activated", bytes_per_token=b * shared, is_remade=True))
    return pieces
