"""cuDNN's flash attention as a ``Kernel``.

``jax.nn.dot_product_attention`` will not do. It rounds the log-sum-exp to the type of the output: 10.03 becomes 10 in
bfloat16, and the weight of a part is 3 % off. And its backward pass takes no output and log-sum-exp but its own, and
ignores the gradient of the latter. What stands under it does better, and takes heads before positions as we do. It is
private to JAX; the names below are those of 0.10.2 and 0.11.2, and no other module uses them.
"""

from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fmha
from jaxtyping import Array, Float

from kardia_jax.model.attention import Part, Scoring
from kardia_jax.model.fused import Grads, Kernel, Keys


def _forward(q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring) -> Part:
    operands, options = _call(q, keys, scoring)
    out, lse = fmha._dot_product_attention_fwd_p_wrapper.bind(*operands, **options, is_training=True)
    return Part(out, lse)


def _backward(
    q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring, merged: Part, d_out: Float[Array, "B H T E"]
) -> Grads:
    operands, options = _call(q, keys, scoring)
    rest = (merged.lse, merged.out, d_out)
    d_q, d_k, d_v = fmha._dot_product_attention_bwd_p_wrapper.bind(*operands, *rest, **options)
    return d_q, d_k, d_v


def _call(q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """What both passes are told: q, k, v, bias, lengths of queries and of keys, offsets and pages; and options."""
    unused = jnp.zeros(0, q.dtype)
    mask, lengths = fmha.MaskType.CAUSAL, (unused, unused)
    if keys.lengths is not None:
        mask = fmha.MaskType.PADDING
        lengths = (jnp.full(q.shape[0], q.shape[2], jnp.int32), keys.lengths.astype(jnp.int32))
    options = {
        "scale": scoring.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": fmha.AttentionLayout.BNTH.value,
        "sliding_window_length": None,
    }
    return (q, keys.k, keys.v, unused, *lengths, *[unused] * 4), options


KERNEL = Kernel(_forward, _backward)
