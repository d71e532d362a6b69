"""cuDNN's flash attention as a ``Kernel``.

``jax.nn.dot_product_attention`` will not do: it rounds the log-sum-exp to the type of the output (in bfloat16 an error of
3 % in the weight of a part), and its backward pass takes no output and log-sum-exp but its own. What stands under it
does both, and takes heads before positions as we do. It is private to JAX; the names below are those of 0.10.2 and
0.11.2, and no other module uses them.
"""

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fmha
from jaxtyping import Array, Float

from kardia_jax.model.attention import Part, Scoring
from kardia_jax.model.fused import Grads, Kernel, Keys

LAYOUT = "BNTH"
"""cuDNN's letters for [B, H, T, E]."""


def _forward(q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring) -> Part:
    mask, *lengths = _mask(q, keys)
    out, lse = fmha.dot_product_attention(
        q,
        keys.k,
        keys.v,
        None,
        None,
        *lengths,
        scale=scoring.scale,
        mask_type=mask,
        qkv_layout=LAYOUT,
        return_residual=True,
    )
    return Part(out, lse)


def _backward(
    q: Float[Array, "B H T E"], keys: Keys, scoring: Scoring, merged: Part, d_out: Float[Array, "B H T E"]
) -> Grads:
    mask, *lengths = _mask(q, keys)
    unused = jnp.zeros(0, q.dtype)
    bias, q_lengths, k_lengths = unused, *(unused if each is None else each for each in lengths)
    offsets_and_pages = [unused] * 4
    d_q, d_k, d_v = fmha._dot_product_attention_bwd_p_wrapper.bind(
        *(q, keys.k, keys.v, bias, q_lengths, k_lengths, *offsets_and_pages, merged.lse, merged.out, d_out),
        scale=scoring.scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=fmha.AttentionLayout[LAYOUT].value,
        sliding_window_length=None,
    )
    return d_q, d_k, d_v


def _mask(q: Array, keys: Keys) -> tuple[fmha.MaskType, Array | None, Array | None]:
    """The kind of mask, and how many queries and keys of each row count where it goes by lengths."""
    if keys.lengths is None:
        return fmha.MaskType.CAUSAL, None, None
    return fmha.MaskType.PADDING, jnp.full(q.shape[0], q.shape[2], jnp.int32), keys.lengths.astype(jnp.int32)


KERNEL = Kernel(_forward, _backward)
