"""Low-rank adapters as parameter trees: how one starts, joins the frozen base, and is merged into it.

An adapter has the nesting of the base it belongs to, with two leaves per adapted layer, stacked over L like the base:

    frozen   {"blocks": {"attention": {"q": {"kernel": [L, D, H, E]}, ...}, ...}, "embed": ..., "final_norm": ...}
    trained  {"blocks": {"attention": {"q": {"lora_a": [L, D, r], "lora_b": [L, r, H, E]}}}}

``joined(lora, frozen, trained)`` is what the model reads: both in one tree, lora_b multiplied by the scale here and
nowhere else. Without an adapter ``frozen`` is empty and ``trained`` is the whole model, so the same call serves full
fine-tuning. Source of the method: arXiv 2106.09685; of the start and the scale: PEFT.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from kardia_jax.config import LoraConfig
from kardia_jax.types import Params


class Site(NamedTuple):
    """Where a block keeps a linear layer, and how many axes of its kernel are inputs."""

    part: str
    name: str
    inputs: int


SITES = {
    "q_proj": Site("attention", "q", 1),
    "k_proj": Site("attention", "k", 1),
    "v_proj": Site("attention", "v", 1),
    "o_proj": Site("attention", "o", 2),
    "gate_proj": Site("mlp", "gate", 1),
    "up_proj": Site("mlp", "up", 1),
    "down_proj": Site("mlp", "down", 1),
}
"""By the name that Hugging Face gives it. The place in this table is part of a layer's random key: append."""


def init_adapter(lora: LoraConfig, base: Params, key: Key[Array, ""]) -> Params:
    """A uniform in +-(fan-in)^-1/2 (Kaiming with a = sqrt 5, as in PEFT), B zero: a new adapter changes nothing."""
    adapter: Params = {}
    for index, (target, site) in enumerate(SITES.items()):
        if target not in lora.names:
            continue
        layers, *shape = base["blocks"][site.part][site.name]["kernel"].shape
        taken, given = shape[: site.inputs], shape[site.inputs :]
        bound = math.prod(taken) ** -0.5
        start = jax.random.uniform(jax.random.fold_in(key, index), (layers, *taken, lora.rank), float, -bound, bound)
        pair = {"lora_a": start, "lora_b": jnp.zeros((layers, lora.rank, *given))}
        adapter = union(adapter, at(site, pair))
    return adapter


def joined(lora: LoraConfig, frozen: Params, trained: Params) -> Params:
    """The parameters that the model reads: base and adapter in one tree, lora_b scaled."""

    def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf * lora.scale if path[-1].key == "lora_b" else leaf

    return union(frozen, jax.tree.map_with_path(scaled, trained))


def with_dropout(params: Params, rate: float, key: Key[Array, ""]) -> Params:
    """The same parameters, with a key [L] and a keep rate [L] in every adapted layer: these leaves are the dropout."""
    for index, site in enumerate(SITES.values()):
        linear = params["blocks"][site.part][site.name]
        if "lora_a" in linear:
            layers = linear["lora_a"].shape[0]
            keys = jax.random.split(jax.random.fold_in(key, index), layers)
            leaves = {"dropout": {"key": keys, "keep": jnp.full(layers, 1 - rate)}}
            params = union(params, at(site, leaves))
    return params


def merged(layer: Params) -> Params:
    """One block, or any part of it, with W + A B for every W that has an adapter; those kernels become float32."""
    if "lora_a" in layer:
        change = jnp.tensordot(layer["lora_a"], layer["lora_b"], 1)
        kept = {name: leaf for name, leaf in layer.items() if name not in ("lora_a", "lora_b")}
        return kept | {"kernel": layer["kernel"].astype(jnp.float32) + change}
    return {name: merged(node) if isinstance(node, dict) else node for name, node in layer.items()}


def merged_model(params: Params) -> Params:
    """``merged`` for the stacked blocks of a whole model."""
    return params | {"blocks": jax.vmap(merged)(params["blocks"])}


def union(base: Params, other: Params) -> Params:
    """Both trees in one; where they share a name that is no dict, the other's."""
    both = base.keys() & other.keys()
    shared = {name: union(base[name], other[name]) for name in both if isinstance(other[name], dict)}
    return base | other | shared


def at(site: Site, leaves: Params) -> Params:
    """The tree that holds these leaves at a site and nothing else."""
    return {"blocks": {site.part: {site.name: leaves}}}
