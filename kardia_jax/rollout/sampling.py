"""Drawing one token per row: filters, the draw itself, and its log-prob under two distributions.

All controls are arrays, so changing them compiles nothing. The filters apply in the order temperature, top-k, top-p
(on what top-k left), min-p, as in transformers; tokens that tie with the last one kept are kept too.

The vocabulary comes first, [V, N], as ``sampled_logits`` makes it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kardia_jax.config import SamplerConfig
from kardia_jax.model.sharding import cut, first_row, largest, on_each_device, summed

BLOCK = 128
"""Tokens per block of the two-level draw."""


Axes = tuple[str, ...]
"""Axes of the mesh that share the vocabulary; none on one device."""


class Controls(NamedTuple):
    """How to draw, as arrays; the same for all rows."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]

    @classmethod
    def from_config(cls, config: SamplerConfig) -> "Controls":
        """The config's numbers on the device."""
        number = jnp.float32
        temperature, top_p, min_p = number(config.temperature), number(config.top_p), number(config.min_p)
        return cls(temperature, jnp.int32(config.top_k), top_p, min_p)


class Draw(NamedTuple):
    """One token per row."""

    token: Int[Array, " N"]
    sampler_logprob: Float[Array, " N"]
    """Under the distribution drawn from: filtered and renormalised; 0 for greedy."""
    tempered_logprob: Float[Array, " N"]
    """Under softmax(logits / temperature), nothing filtered; temperature 1 for greedy."""


def draw(logits: Float[Array, "V N"], keys: Key[Array, " N"], controls: Controls) -> Draw:
    """Draws from softmax(logits / temperature) after the filters; temperature 0 takes the most likely token.

    On a mesh each device has part of the vocabulary for its own rows, and of the draw what is gathered is one number
    for each block. The filters alone need whole rows and gather them.
    """
    here = functools.partial(_draw_here, cut("used").vocabulary)
    return on_each_device(here, ("VN", "N", ""), "N")(logits, keys, controls)


def _draw_here(over: Axes, logits: Float[Array, "V N"], keys: Key[Array, " N"], controls: Controls) -> Draw:
    greedy = controls.temperature == 0
    z = logits / jnp.where(greedy, 1.0, controls.temperature)
    filtering = ((controls.top_k > 0) | (controls.top_p < 1) | (controls.min_p > 0)) & ~greedy
    # The sort behind the filters costs more than the rest of the draw: skipped at run time when nothing filters.
    floor = jax.lax.cond(filtering, lambda: _floor(over, z, controls), lambda: jnp.full(z.shape[1], -jnp.inf, z.dtype))
    peak = largest(z.max(0), over)
    # Exponentials over the vocabulary are the next in cost: the draw and both log-probs share them. What is not a
    # number is below no floor, and shows in the log-probs.
    weights = jnp.where(z < floor, 0, jnp.exp(z - peak))
    kept = weights.sum(0)
    unfiltered = jax.lax.cond(filtering, lambda: jnp.exp(z - peak).sum(0), lambda: kept)
    total, whole = summed((kept, unfiltered), over)
    uniform = jax.vmap(jax.random.uniform)(keys)
    # Finding the most likely token costs as much as the rest of the draw: only where it is asked for.
    token = jax.lax.cond(greedy, lambda: _most_likely(over, z), lambda: inverse_cdf(weights, uniform, over))
    chosen = _taken(over, z, token) - peak
    return Draw(token, jnp.where(greedy, 0.0, chosen - jnp.log(total)), chosen - jnp.log(whole))


def _most_likely(over: Axes, z: Float[Array, "V N"]) -> Int[Array, " N"]:
    if not over:
        return z.argmax(0)
    # The first of those that are equal, as argmax takes.
    peak, place = z.max(0), z.argmax(0) + first_row(z.shape[0], over)
    return jax.lax.pmin(jnp.where(peak == largest(peak, over), place, jnp.iinfo(jnp.int32).max), over)


def _floor(over: Axes, z: Float[Array, "V N"], controls: Controls) -> Float[Array, " N"]:
    return filter_floor((jax.lax.all_gather(z, over, tiled=True) if over else z).T, controls)


def _taken(over: Axes, x: Float[Array, "M ... N"], place: Int[Array, " N"]) -> Float[Array, "N ..."]:
    """x at each row's place among all that the devices have, from the one that has it."""

    def at(index: Int[Array, " N"]) -> Array:
        return x[index, ..., jnp.arange(x.shape[-1])]

    if not over:
        return at(place)
    here = place - first_row(x.shape[0], over)
    mine = (here >= 0) & (here < x.shape[0])
    return summed(jnp.where(mine.reshape(-1, *[1] * (x.ndim - 2)), at(jnp.clip(here, 0, x.shape[0] - 1)), 0), over)


def filter_floor(z: Float[Array, "N V"], controls: Controls) -> Float[Array, " N"]:
    """The smallest scaled logit that top-k, top-p and min-p all keep."""
    ranked = jnp.sort(z, -1, descending=True)
    size = z.shape[-1]
    top_k = jnp.where(controls.top_k > 0, jnp.minimum(controls.top_k, size), size)
    in_top_k = jnp.arange(size) < top_k
    p = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), -1)
    before = jnp.cumsum(p, -1) - p
    # The most likely token always stays, and all do when top-p is off, whatever rounding does to the running sum.
    keep = in_top_k & ((before < controls.top_p) | (controls.top_p >= 1) | (jnp.arange(size) == 0))
    nucleus = jnp.where(keep, ranked, jnp.inf).min(-1)
    return jnp.maximum(nucleus, ranked[:, 0] + jnp.log(controls.min_p))


def inverse_cdf(weights: Float[Array, "V N"], uniform: Float[Array, " N"], over: Axes = ()) -> Int[Array, " N"]:
    """The token at which the running sum of ``weights`` first exceeds uniform * total; its weight is above 0.

    One uniform number per row is exact and far cheaper than Gumbel noise over the vocabulary. Two levels - blocks,
    then inside one block - keep the running sums short, which is both faster and closer to exact. Where axes of the
    mesh share the vocabulary (``over``), each device sums its own blocks; the sums of all are gathered, in the order of
    the tokens, and then the one block that is wanted.
    """
    size, rows = weights.shape
    blocks = jnp.pad(weights, ((0, -size % BLOCK), (0, 0))).reshape(-1, BLOCK, rows)
    own, sums = blocks.shape[0], blocks.sum(1).T
    sums = jax.lax.all_gather(sums, over, axis=1, tiled=True) if over else sums
    target = uniform * sums.sum(-1)
    upto = jnp.cumsum(sums, -1)
    block = _first_above(upto, target, sums)
    inside = _taken(over, blocks, block)
    start = jnp.take_along_axis(upto - sums, block[:, None], 1)[:, 0]
    first = block // own * size + block % own * BLOCK if over else block * BLOCK
    token = first + _first_above(jnp.cumsum(inside, -1), target - start, inside)
    # Weights that are no numbers lead into the padding of the last block.
    return jnp.minimum(token, sums.shape[1] // own * size - 1)


def _first_above(
    running: Float[Array, "N M"], target: Float[Array, " N"], own: Float[Array, "N M"]
) -> Int[Array, " N"]:
    """First index with running > target and own > 0; when rounding leaves none, the last index with own > 0."""
    positive = own > 0
    hit = positive & (running > target[:, None])
    last = own.shape[1] - 1 - jnp.argmax(positive[:, ::-1], -1)
    return jnp.where(hit.any(-1), jnp.argmax(hit, -1), last)
