"""Models out of GGUF files: a Llama written as llama.cpp's converter writes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import policy
from policy import CheckpointError
from policy.tokenizer import TokenizerError, load_tokenizer

CHARACTERS = list(bytes_to_unicode().values())
MERGES = ["a b", "ab c"]
TOKENS = [*CHARACTERS, "<eos>", "ab", "abc"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=5000.0, rms_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def to_neighbours(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection, from RoPE in halves to RoPE of neighbours, which is what llama.cpp turns."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, path: Path, *, has_rope_table: bool = False) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(TOKENS.index("<eos>"))
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name not in outer:
            layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                array = to_neighbours(array, heads[part[10]])
            name = f"blk.{layer}.{NAMES[part]}.weight"
        writer.add_tensor(outer.get(name, name), np.ascontiguousarray(array))
    if has_rope_table:
        writer.add_tensor("rope_freqs.weight", np.ones(config.head_dim // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_it_was_written_from_and_its_tokenizer(tmp_path: Path) -> None:
    model, file = make_llama(), tmp_path / "tiny.gguf"
    write_gguf(model, file)
    token_ids_BS = torch.randint(0, len(TOKENS), (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for place in (file, tmp_path):
            ours = policy.load(place)
            assert (ours.logits(token_ids_BS) - model(token_ids_BS).logits).abs().max() < 1e-4
    tokenizer = load_tokenizer(file)
    assert tokenizer.decode(tokenizer.encode("abcab é")) == "abcab é"
    assert tokenizer.encode("abcab") == [TOKENS.index("abc"), TOKENS.index("ab")]
    assert tokenizer.eos_token_id == TOKENS.index("<eos>")

    policy.save(ours, tmp_path / "saved")
    tokenizer.save(tmp_path / "saved")
    assert policy.load(tmp_path / "saved").config == ours.config
    assert load_tokenizer(tmp_path / "saved").encode("abcab é") == tokenizer.encode("abcab é")


def test_a_table_of_rope_frequencies_is_refused(tmp_path: Path) -> None:
    write_gguf(make_llama(), tmp_path / "tiny.gguf", has_rope_table=True)
    with pytest.raises(CheckpointError, match="scales RoPE by a table"):
        policy.load(tmp_path)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(CheckpointError, match=r"cannot read .*tiny.gguf"):
        policy.load(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 GGUF files; name one of them: other.gguf, tiny.gguf"):
        policy.load(tmp_path)
    with pytest.raises(TokenizerError, match="has 2 GGUF files"):
        load_tokenizer(tmp_path)
