"""Splash attention (Pallas, TPU) as a ``Kernel``.

Splash takes one row, scaled queries and lengths that fill whole tiles. Its public form gives the log-sum-exp without a
gradient, or a gradient with its own log-sum-exp; the backward pass under it takes ours. That function is private to
JAX; its name is the same in 0.10.2 and 0.11.2, and no other module uses it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from kardia_jax.model.attention import Part, Scoring
from kardia_jax.model.fused import Grads, Kernel, Keys

LANES = 128
"""Lengths and tiles are multiples of this."""
LARGEST_TILE = 512
"""Positions of queries and of keys in a tile, where the length allows."""


@functools.cache
def kernel(interpret: bool = False) -> Kernel:
    """The kernel, or the same program run by XLA (``interpret``) where there is no TPU."""
    return Kernel(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


def _forward(interpret: bool, q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring) -> Part:
    length = q.shape[2]
    q, k, v, ids = _tiled(q, keys, scoring)
    run = _splash(q, k, keys, scoring, interpret)
    out, (lse,) = jax.vmap(run)(q, k, v, ids)
    return Part(out[:, :, :length], lse[:, :, :length])


def _backward(
    interpret: bool,
    q: Float[Array, "B H T E"],
    keys: Keys,
    scoring: Scoring,
    merged: Part,
    d_out: Float[Array, "B H T E"],
) -> Grads:
    length, size = q.shape[2], keys.k.shape[2]
    q, k, v, ids = _tiled(q, keys, scoring)
    run = _splash(q, k, keys, scoring, interpret)

    def row(q: Array, k: Array, v: Array, ids: splash.SegmentIds | None, out: Array, lse: Array, d_out: Array) -> Grads:
        saved = (q, k, v, ids, None, out, lse, run.dq_mask_info, run.dkv_mask_info)
        d_q, d_k, d_v = splash._splash_attention_bwd(**run.kwargs, res=saved, do=d_out)[3:6]
        return d_q, d_k, d_v

    # A padded query has gradient 0 and so gives none; lse 0 keeps it finite.
    rest = _filled(merged.out), _filled(merged.lse[..., None])[..., 0], _filled(d_out)
    d_q, d_k, d_v = jax.vmap(row)(q, k, v, ids, *rest)
    return d_q[:, :, :length] * scoring.scale, d_k[:, :, :size], d_v[:, :, :size]


def _tiled(q: Array, keys: Keys, scoring: Scoring) -> tuple[Array, Array, Array, splash.SegmentIds | None]:
    """Scaled queries and keys filled up to whole tiles, and the ids that keep queries (1) from keys beyond (0)."""
    q, k, v = _filled(q * scoring.scale), _filled(keys.k), _filled(keys.v)
    if keys.lengths is None:
        return q, k, v, None
    kept = jnp.arange(k.shape[2]) < keys.lengths[:, None]
    return q, k, v, splash.SegmentIds(jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kept.astype(jnp.int32))


def _filled(x: Float[Array, "B H T E"]) -> Float[Array, "B H N E"]:
    """Zeros behind the last position, up to whole tiles."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)))


def _splash(q: Array, k: Array, keys: Keys, scoring: Scoring, interpret: bool) -> splash.SplashAttentionKernel:
    shape = (q.shape[2], k.shape[2])
    mask = masks.CausalMask(shape) if keys.lengths is None else masks.FullMask(shape)
    rows, columns = _tile(shape[0]), _tile(shape[1])
    tiles = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=tiles,
        save_residuals=True,
        attn_logits_soft_cap=scoring.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _tile(length: int) -> int:
    """The largest multiple of 128 that divides the length, up to 512."""
    return max(tile for tile in range(LANES, LARGEST_TILE + 1, LANES) if length % tile == 0)
