"""Names and layouts: which GGUF tensor is which Hugging Face tensor, and what the converter did to its numbers.

In: an architecture of GGUF and a tensor of the file. Out: the Hugging Face name and the numbers as they were.

    hf_name(ARCHITECTURES["llama"], "blk.3.attn_q.weight")   # "model.layers.3.self_attn.q_proj.weight"

Two things are undone (source: llama.cpp, convert_hf_to_gguf.py). The rows of queries and keys of ``llama`` stand in
the order of a rotary embedding that turns neighbours: row 2j + p of a head was row p E/2 + j. And the norms of
``gemma3`` hold 1 + weight.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
EMBED, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Gemma normalises before and after each half of a block, so ``ffn_norm`` is another norm than elsewhere."""

IN_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<kind>weight|bias)")


class Architecture(NamedTuple):
    """What one architecture of GGUF is called in Hugging Face."""

    name: str
    """``general.architecture``, and the prefix of its metadata."""
    model_type: str
    model_class: str
    block: Mapping[str, str]
    rows_permuted: bool = False
    """Queries and keys stand in the interleaved order."""
    norm_offset: float = 0.0
    """What was added to every norm."""


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("llama", "llama", "LlamaForCausalLM", BLOCK, rows_permuted=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", BLOCK),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", BLOCK | QK_NORM),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", BLOCK | QK_NORM | SANDWICH, norm_offset=1.0),
    )
}


def hf_name(architecture: Architecture, name: str) -> str | None:
    """The Hugging Face name; None for a tensor that this architecture does not have."""
    match = IN_BLOCK.fullmatch(name)
    if match is None:
        return TOP.get(name)
    part = architecture.block.get(match["part"])
    return None if part is None else f"model.layers.{match['layer']}.{part}.{match['kind']}"


def hf_values(architecture: Architecture, name: str, tensor: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """The numbers of a dequantised tensor as Hugging Face stores them; ``heads`` and ``kv_heads`` are H and K."""
    match = IN_BLOCK.fullmatch(name)
    part = match["part"] if match else ""
    if architecture.rows_permuted and part in ("attn_q", "attn_k"):
        return unpermuted(tensor, heads if part == "attn_q" else kv_heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return tensor - np.float32(architecture.norm_offset)
    return tensor


def unpermuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads, E/2, 2] of each head back to [heads, 2, E/2]; a weight [heads E, D] or a bias [heads E]."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
