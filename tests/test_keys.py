"""Keys are a pure function of (seed, purpose, step, prompt, sample), and no two of those share one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.keys import Purpose, key_for, row_keys

compiled_rows = jax.jit(row_keys, static_argnames=("seed", "purpose", "group"))


def data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def rows(seed: int = 0, purpose: Purpose = Purpose.ROLLOUT, step: int = 0, prompts: tuple[int, ...] = (0, 1, 2, 3)):
    """Key data [P, 3, words] of three samples per prompt."""
    return data(compiled_rows(seed, purpose, jnp.int32(step), jnp.array(prompts), 3))


def test_the_numbers_of_purposes_are_frozen():
    # A checkpoint stores no key: renumbering a stream would change what a resumed run draws.
    numbers = {purpose.name: purpose.value for purpose in Purpose}
    frozen = {"INIT": 0, "ROLLOUT": 1, "EVALUATION": 2, "ADAPTER": 3, "DROPOUT": 4}
    assert frozen.items() <= numbers.items()
    assert len(set(numbers.values())) == len(numbers)


def test_a_key_is_its_path_folded_in_from_left_to_right():
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), 7), 9)
    np.testing.assert_array_equal(data(key_for(5, Purpose.ROLLOUT, 7, 9)), data(by_hand))


def test_a_row_key_is_the_key_of_its_path():
    got = rows(seed=11, purpose=Purpose.EVALUATION, step=4, prompts=(7, 2, 9, 0))
    for (p, prompt), sample in itertools.product(enumerate((7, 2, 9, 0)), range(3)):
        np.testing.assert_array_equal(got[p, sample], data(key_for(11, Purpose.EVALUATION, 4, prompt, sample)))


def test_a_step_on_the_device_gives_the_key_of_the_same_step_on_the_host():
    traced = jax.jit(lambda step: key_for(3, Purpose.INIT, step))(jnp.int32(12))
    np.testing.assert_array_equal(data(traced), data(key_for(3, Purpose.INIT, 12)))


def test_seeds_purposes_steps_prompts_and_samples_all_differ():
    drawn = [
        rows(seed, purpose, step).reshape(-1, 2)
        for seed, purpose, step in itertools.product((0, 1), (Purpose.ROLLOUT, Purpose.EVALUATION), (0, 1, 2))
    ]
    distinct = np.unique(np.concatenate(drawn), axis=0)
    assert len(distinct) == 2 * 2 * 3 * 4 * 3


def test_swapping_two_numbers_of_a_path_gives_another_key():
    assert (data(key_for(0, Purpose.ROLLOUT, 1, 2)) != data(key_for(0, Purpose.ROLLOUT, 2, 1))).any()
    assert (data(key_for(1, Purpose.INIT)) != data(key_for(0, Purpose.ROLLOUT))).any()


@settings(deadline=None, max_examples=25)
@given(prompts=st.permutations(range(4)), step=st.integers(0, 10_000))
def test_row_order_does_not_matter(prompts: list[int], step: int):
    np.testing.assert_array_equal(rows(step=step, prompts=tuple(prompts)), rows(step=step)[prompts])


def test_batch_and_group_size_do_not_matter():
    alone = data(row_keys(0, Purpose.ROLLOUT, 2, jnp.array([3]), 2))
    np.testing.assert_array_equal(alone[0], rows(step=2)[3, :2])


def test_a_prompt_that_stands_twice_in_a_batch_draws_other_samples():
    twice = data(row_keys(0, Purpose.ROLLOUT, 2, jnp.array([3, 8, 3]), 2))
    once = data(row_keys(0, Purpose.ROLLOUT, 2, jnp.array([3]), 4))
    np.testing.assert_array_equal(twice[0], once[0, :2])
    np.testing.assert_array_equal(twice[2], once[0, 2:])
