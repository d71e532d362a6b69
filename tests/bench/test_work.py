import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.bench import work
from kardia_jax.bench.work import Lengths, Work
from kardia_jax.model.policy import Compute, group_hidden, init, logits
from kardia_jax.model.shapes import SHAPES, TINY
from kardia_jax.model.spec import ModelSpec

# 8 x 4 x (2 x 2 + 2 x 1) + 3 x 8 x 16 = 576 weights in the block, 32 x 8 = 256 in the table, 24 in norms.
SMALL = ModelSpec(
    family="llama", vocab_size=32, width=8, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=4, max_positions=64
)
LENGTHS = Lengths(prompts=1, group=2, prompt_len=3, new_tokens=2)

# XLA also counts norms, softmax and activations, and attention over masked pairs: at these sizes under a tenth.
XLA_TOLERANCE = 0.1


def test_the_parts_of_a_model_by_hand():
    assert work.block_parameters(SMALL) == 576
    assert work.head_parameters(SMALL) == 256
    assert work.block_parameters(SMALL) + work.head_parameters(SMALL) + 24 == SMALL.parameter_count


def test_prefill_by_hand():
    # Prompt: 2 x 576 x 3 + 4 x 2 x 4 x (1 + 2 + 3) = 3648; a head for each completion's first token: 2 x 256.
    # Bytes: 832 weights of 4, and keys and values of 3 tokens, 2 x 1 x 4 numbers each.
    assert work.prefill(SMALL, LENGTHS, 4) == Work(3648 + 2 * 512, 2 * (3648 + 512), 832 * 4 + 3 * 8 * 4)


def test_decode_by_hand():
    # One step at position 3, which sees 4 keys: 2 x 576 + 32 x 4 + 2 x 256 = 1792 for each row. The prompt's 3 keys are
    # read once for the group, one own key is read and one written by each of the two rows; halves in bfloat16.
    moved = 832 + 8 * (3 + 2 * 1) + 8 * 2
    assert work.decode(SMALL, LENGTHS, 4) == Work(2 * 1792, 2 * 1792, 4 * moved)
    assert work.decode(SMALL, LENGTHS, 2) == Work(2 * 1792, 2 * 1792, 2 * moved)


def test_score_and_update_by_hand():
    # Completion: 2 x 576 x 2 + 32 x (4 + 5) + 2 x 256 x 2 = 3616.
    scored = work.score(SMALL, LENGTHS)
    assert scored == Work(3648 + 2 * 3616, 2 * (3648 + 3616), 856 * 4)
    # Two reads of parameters, a read and a write of the gradient; then AdamW moves 7 arrays.
    assert work.update(SMALL, LENGTHS, 1) == Work(3 * scored.shared_flops, 3 * scored.repeated_flops, 11 * 856 * 4)
    assert work.update(SMALL, LENGTHS, 3).bytes == 19 * 856 * 4


def test_a_window_bounds_what_is_seen():
    spec = dataclasses.replace(
        SMALL, family="gemma2", layers=2, window=2, layer_types=("sliding_attention", "full_attention")
    )
    # Positions 0 to 3 see 1, 2, 3, 4 keys without a window and 1, 2, 2, 2 with it.
    assert work.keys_seen(spec, 0, 4) == 10 + 7
    # Decoding 2 steps after a prompt of 3: a window of 2 reads 1 + 0 keys of the prompt, one of 3 reads 2 + 1; what a
    # completion reads of its own is the same. A key and its value are 2 x 4 numbers of 4 bytes.
    longer = LENGTHS._replace(new_tokens=3)
    wide = work.decode(dataclasses.replace(spec, window=3), longer, 4).bytes
    assert wide - work.decode(spec, longer, 4).bytes == 2 * 8 * 4


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "tiny-gemma2"])
def test_sharing_saves_the_prompts_alone(name):
    spec, lengths = SHAPES[name], Lengths(4, 8, 512, 128)
    shared, repeated, _ = work.score(spec, lengths)
    assert repeated - shared == 4 * 7 * work.forward_flops(spec, 0, 512)
    one = Lengths(4, 1, 512, 128)
    assert work.score(spec, one).shared_flops == work.score(spec, one).repeated_flops


def counted_by_xla(function, *arguments) -> float:
    """FLOPs of the compiled function; blocks must be unrolled, since it counts the body of a loop once."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_flops_are_those_that_xla_counts():
    spec = dataclasses.replace(TINY, vocab_size=256)
    compute = Compute("float32", "none", unroll=spec.layers)
    params = jax.eval_shape(functools.partial(init, spec), jax.random.key(0))
    prompts, group, size, new = 2, 4, 24, 16

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    rows = functools.partial(logits, spec, compute)
    plain = counted_by_xla(rows, params, ids(prompts * group, size + new), ids(prompts * group))
    one = work.forward_flops(spec, 0, size + new)
    head = 2 * work.head_parameters(spec)
    np.testing.assert_allclose(plain, prompts * group * (one + head * (size + new)), rtol=XLA_TOLERANCE)

    hidden = functools.partial(group_hidden, spec, compute)
    shared = counted_by_xla(hidden, params, ids(prompts, size), ids(prompts, group), ids(prompts, group, new))
    scored = work.score(spec, Lengths(prompts, group, size, new))
    heads = head * prompts * group * new
    np.testing.assert_allclose(shared, scored.shared_flops - heads, rtol=XLA_TOLERANCE)
