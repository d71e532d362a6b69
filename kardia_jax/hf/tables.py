"""Which Hugging Face tensor is which of our arrays, one table per family, read in both directions.

A rule names a tensor, our path, and the axes of both in the alphabet of ``kardia_jax.types``; axes in
brackets are merged into one. The shapes, the reshape and the transpose follow from the letters:

    Rule("model.layers.{layer}.self_attn.q_proj.weight", "blocks.attention.q.kernel", "(HE)D", "DHE")

says that a tensor [H*E, D] is split to [H, E, D], transposed to [D, H, E] and stored at index ``layer`` of
the stacked kernel [L, D, H, E]. A name without ``{layer}`` stands for one array that is not stacked.

A new family is a new tuple in ``FAMILIES`` and a row in ``kardia_jax.model.families``.
"""

import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from kardia_jax.model.families import TRAITS, Family
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params

Sizes = dict[str, int]
"""Length of each axis, by its letter."""


class HfError(ValueError):
    """A directory that cannot be read or written: names it, what was wanted, what came and what to do."""


class Found(NamedTuple):
    """A tensor as the header of its file describes it."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]


class Rule(NamedTuple):
    """One tensor of a checkpoint, or one per layer."""

    name: str
    path: str
    hf_axes: str
    axes: str

    @property
    def stacked(self) -> bool:
        """One tensor per layer."""
        return "{layer}" in self.name


class Entry(NamedTuple):
    """One tensor by its full name: which rule made it, and its layer (0 when not stacked)."""

    rule: Rule
    layer: int


LAYER = "model.layers.{layer}."

EMBED = Rule("model.embed_tokens.weight", "embed.embedding", "VD", "VD")
HEAD = Rule("lm_head.weight", "head.embedding", "VD", "VD")

BACKBONE = (
    EMBED,
    Rule(LAYER + "input_layernorm.weight", "blocks.attention_norm.scale", "D", "D"),
    Rule(LAYER + "self_attn.q_proj.weight", "blocks.attention.q.kernel", "(HE)D", "DHE"),
    Rule(LAYER + "self_attn.k_proj.weight", "blocks.attention.k.kernel", "(KE)D", "DKE"),
    Rule(LAYER + "self_attn.v_proj.weight", "blocks.attention.v.kernel", "(KE)D", "DKE"),
    Rule(LAYER + "self_attn.o_proj.weight", "blocks.attention.o.kernel", "D(HE)", "HED"),
    Rule(LAYER + "post_attention_layernorm.weight", "blocks.mlp_norm.scale", "D", "D"),
    Rule(LAYER + "mlp.gate_proj.weight", "blocks.mlp.gate.kernel", "FD", "DF"),
    Rule(LAYER + "mlp.up_proj.weight", "blocks.mlp.up.kernel", "FD", "DF"),
    Rule(LAYER + "mlp.down_proj.weight", "blocks.mlp.down.kernel", "DF", "FD"),
    Rule("model.norm.weight", "final_norm.scale", "D", "D"),
)
QKV_BIAS = (
    Rule(LAYER + "self_attn.q_proj.bias", "blocks.attention.q.bias", "(HE)", "HE"),
    Rule(LAYER + "self_attn.k_proj.bias", "blocks.attention.k.bias", "(KE)", "KE"),
    Rule(LAYER + "self_attn.v_proj.bias", "blocks.attention.v.bias", "(KE)", "KE"),
)
QK_NORM = (
    Rule(LAYER + "self_attn.q_norm.weight", "blocks.attention.q_norm.scale", "E", "E"),
    Rule(LAYER + "self_attn.k_norm.weight", "blocks.attention.k_norm.scale", "E", "E"),
)

POST_ATTENTION = "post_attention_layernorm"
POST_NORMS = (
    Rule(LAYER + POST_ATTENTION + ".weight", "blocks.attention_post_norm.scale", "D", "D"),
    Rule(LAYER + "pre_feedforward_layernorm.weight", "blocks.mlp_norm.scale", "D", "D"),
    Rule(LAYER + "post_feedforward_layernorm.weight", "blocks.mlp_post_norm.scale", "D", "D"),
)
"""With norms on both sides Hugging Face's name for the norm before the mlp goes to the one after attention."""
SANDWICH = tuple(rule for rule in BACKBONE if POST_ATTENTION not in rule.name) + POST_NORMS

FAMILIES: dict[Family, tuple[Rule, ...]] = {
    "qwen2": BACKBONE + QKV_BIAS,
    "qwen3": BACKBONE + QK_NORM,
    "llama": BACKBONE,
    "gemma": BACKBONE,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH + QK_NORM,
}


class FamilyRow(NamedTuple):
    """One family of the table of supported models."""

    family: str
    """The name that people use."""
    model_type: Family
    architecture: str
    features: tuple[str, ...]


NAMES: dict[Family, str] = {
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen3": "Qwen 3 (dense)",
    "llama": "Llama 2, Llama 3, SmolLM2",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
}


def supported_families() -> list[FamilyRow]:
    """Every family that is read and written, in the order of the table."""
    return [FamilyRow(NAMES[kind], kind, TRAITS[kind].architecture, TRAITS[kind].features) for kind in FAMILIES]


def rules(spec: ModelSpec) -> tuple[Rule, ...]:
    """The table of this model; the head has its own tensor only when it is not tied."""
    return FAMILIES[spec.family] if spec.tied else (*FAMILIES[spec.family], HEAD)


def entries(spec: ModelSpec) -> dict[str, Entry]:
    """Every tensor of the checkpoint by its full name."""
    return {
        rule.name.format(layer=layer): Entry(rule, layer)
        for rule in rules(spec)
        for layer in range(spec.layers if rule.stacked else 1)
    }


def sizes(spec: ModelSpec) -> Sizes:
    """Axis lengths of this model."""
    return {
        "V": spec.vocab_size,
        "D": spec.width,
        "F": spec.mlp_width,
        "L": spec.layers,
        "H": spec.heads,
        "K": spec.kv_heads,
        "E": spec.head_dim,
    }


def hf_shape(rule: Rule, sizes: Sizes) -> tuple[int, ...]:
    """Shape of the tensor in the checkpoint: ``(HE)D`` with H=2, E=4, D=8 is (8, 8)."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(rule.hf_axes))


def shape(rule: Rule, sizes: Sizes) -> tuple[int, ...]:
    """Shape of our array, the leading L of a stacked one included."""
    return tuple(sizes[axis] for axis in ("L" if rule.stacked else "") + rule.axes)


def from_hf(rule: Rule, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
    """One tensor of the checkpoint in our layout (a view), without L."""
    assert tensor.shape == hf_shape(rule, sizes), (rule.name, tensor.shape, hf_shape(rule, sizes))
    flat = _flat(rule)
    split = tensor.reshape([sizes[axis] for axis in flat])
    return split.transpose([flat.index(axis) for axis in rule.axes])


def to_hf(rule: Rule, array: np.ndarray, sizes: Sizes) -> np.ndarray:
    """One of our arrays, without L, in the layout of the checkpoint, contiguous."""
    wanted = tuple(sizes[axis] for axis in rule.axes)
    assert array.shape == wanted, (rule.path, array.shape, wanted)
    turned = array.transpose([rule.axes.index(axis) for axis in _flat(rule)])
    return np.ascontiguousarray(turned).reshape(hf_shape(rule, sizes))


def leaf(params: Params, path: str) -> Any:
    """The array at a dotted path. Raises KeyError when it is not there."""
    node: Any = params
    for name in path.split("."):
        node = node[name]
    return node


def nested(leaves: dict[str, Any]) -> Params:
    """Arrays by dotted path, as the nested dict that the model reads."""
    params: Params = {}
    for path, array in leaves.items():
        *parents, last = path.split(".")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = array
    return params


def _groups(axes: str) -> list[str]:
    """``(HE)D`` is ["HE", "D"]."""
    return [group.strip("()") for group in re.findall(r"\(\w+\)|\w", axes)]


def _flat(rule: Rule) -> str:
    return "".join(_groups(rule.hf_axes))
