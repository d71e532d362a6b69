"""The host's loop: no row notices who sits beside it, and the device does no more than it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import SamplerConfig
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.rollout import batching, sampler
from kardia_jax.rollout.batching import roll_out
from kardia_jax.rollout.sampling import Controls

LOGPROB_TOLERANCE = 1e-4
"""float32: sums over another batch, or over a longer ring, round differently."""
CONTROLS = Controls.from_config(SamplerConfig())
GREEDY = Controls.from_config(SamplerConfig(temperature=0.0))
PAD, STOP = 0, 60


class Watched:
    """The device's programs, and a note of each call: ("admit", prompts), ("decode", (P, G, T), steps), ..."""

    def __init__(self, programs):
        self.calls: list[tuple] = []
        self.programs = programs._replace(
            admit=self._noted("admit", programs.admit),
            decode=self._noted("decode", programs.decode),
            grow=self._noted("grow", programs.grow),
            keep=self._noted("keep", programs.keep),
        )

    def _noted(self, name, program):
        def call(*arguments, **sizes):
            # A state that was handed over is gone, so what it was is read before.
            state = next(one for one in arguments if isinstance(one, sampler.Rows))
            step, shape = int(state.step), (*state.token.shape, state.caches[0].v.values.shape[2])
            after = program(*arguments, **sizes)
            notes = {
                "admit": lambda: ("admit", len(arguments[2])),
                "decode": lambda: ("decode", shape, int(after.step) - step),
                "grow": lambda: ("grow", sizes["columns"]),
                "keep": lambda: ("keep", after.token.shape),
            }
            self.calls.append(notes[name]())
            return after

        return call

    def named(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]

    def steps(self) -> int:
        return sum(steps for _, steps in self.named("decode"))


def count(counting, lengths, group: int = 2, rows: int = 0, budget: int = 40, finished=None, watched=None):
    """The counting model with one prompt for each of these lengths: the prompt's last token lies so far from STOP."""
    tokens = np.array([[7, STOP - length] for length in lengths], np.int32)
    keys = jax.random.split(jax.random.key(0), (len(lengths), group))
    programs = counting.programs if watched is None else watched.programs
    sizes = np.full(len(lengths), 2, np.int32)
    return roll_out(programs, rows, counting.params, tokens, sizes, keys, GREEDY, (STOP,), PAD, budget, finished)


def counted(lengths, group: int, budget: int) -> np.ndarray:
    row = {n: np.pad(np.arange(STOP - n + 1, STOP + 1), (0, budget - n), constant_values=PAD) for n in set(lengths)}
    return np.stack([[row[n]] * group for n in lengths])


# ---- rows do not notice each other ----

PROMPTS, GROUP, BUDGET = 5, 2, 9
LENGTHS = np.array([6, 1, 4, 3, 6], np.int32)
TOKENS = np.random.default_rng(2).integers(0, 90, (PROMPTS, 6)).astype(np.int32)
KEYS = row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(PROMPTS), GROUP)


@pytest.fixture
def small_steps(monkeypatch):
    """Rings of three columns at first, and a look after every second step."""
    monkeypatch.setattr(batching, "COLUMNS", 3)
    monkeypatch.setattr(batching, "STRETCH", 2)


def drawn(made, rows: int = 0, stop=(-1,) * 4, order=slice(None), finished=None, programs=None):
    prompts = TOKENS[order], LENGTHS[order], KEYS[order]
    return roll_out(programs or made.programs, rows, made.params, *prompts, CONTROLS, stop, PAD, BUDGET, finished)


def alone(made):
    """Each prompt by itself in a ring as long as its budget: nobody is admitted late, moved, or given more room."""
    parts = [drawn(made, order=slice(p, p + 1)) for p in range(PROMPTS)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def cut(free, stop):
    """Tokens, log-probs and lengths as a stop set would have left them."""
    stops = np.isin(free.tokens, stop)
    lengths = np.where(stops.any(-1), stops.argmax(-1) + 1, BUDGET)
    kept = np.arange(BUDGET) < lengths[..., None]
    return np.where(kept, free.tokens, PAD), np.where(kept, free.sampler_logprobs, 0), lengths, stops.any(-1)


@pytest.fixture(scope="module")
def free(model):
    return alone(model("gemma3_text"))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from([0, 1, 5, 6]),
    order=st.permutations(range(PROMPTS)),
    places=st.sets(st.integers(0, PROMPTS * GROUP * BUDGET - 1), max_size=4),
)
def check_rows_do_not_notice(made, free, rows, order, places):
    stop = (*free.tokens.ravel()[sorted(places)].tolist(), -1, -1, -1, -1)[:4]
    heard, order = {}, np.array(order)
    got = drawn(made, rows, stop, order, lambda p, g, tokens: heard.setdefault((p, g), []).append(tokens.tolist()))
    tokens, logprobs, lengths, stopped = (x[order] for x in cut(free, stop))
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.lengths, lengths)
    np.testing.assert_array_equal(got.stopped, stopped)
    np.testing.assert_allclose(got.sampler_logprobs, logprobs, atol=LOGPROB_TOLERANCE)
    assert heard == {at: [tokens[at][: lengths[at]].tolist()] for at in np.ndindex(PROMPTS, GROUP)}


def test_nobody_notices_limit_order_neighbours_moves_or_growth(model, free, small_steps):
    check_rows_do_not_notice(model("gemma3_text"), free)


@pytest.mark.usefixtures("small_steps")
def test_in_those_small_steps_everything_happens(model, free):
    made = model("gemma3_text")
    watched = Watched(made.programs)
    rollouts = drawn(made, rows=4, programs=watched.programs)
    np.testing.assert_array_equal(rollouts.tokens, free.tokens)
    assert watched.named("admit") == [(2,), (2,), (1,)]
    assert watched.named("grow") == [(6,), (12,)]
    assert watched.named("keep") == [((1, 2),)]
    assert watched.steps() == 3 * BUDGET > 2 * 12, "the longest ring goes round"


# ---- seats ----


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 7, 0])
@pytest.mark.parametrize("lengths", [(3, 9, 2, 4, 5), (1, 1, 1, 1, 1, 1, 1)])
def test_no_more_rows_than_allowed_in_whole_groups(counting, lengths, rows):
    watched = Watched(counting.programs)
    rollouts = count(counting, lengths, rows=rows, watched=watched)
    np.testing.assert_array_equal(rollouts.tokens, counted(lengths, 2, 40))
    assert rollouts.lengths.tolist() == [[n, n] for n in lengths]
    places = min(len(lengths), max(1, rows // 2)) if rows else len(lengths)
    shapes = [shape for shape, _ in watched.named("decode")]
    assert shapes[0][:2] == (places, 2)
    assert max(prompts * group for prompts, group, _ in shapes) == places * 2


def test_a_limit_of_one_group_takes_the_prompts_one_by_one(counting):
    watched = Watched(counting.programs)
    count(counting, (3, 9, 2), rows=2, watched=watched)
    assert [call[0] for call in watched.calls] == ["admit", "decode"] * 3
    assert watched.named("decode") == [((1, 2, 48), 3), ((1, 2, 48), 9), ((1, 2, 48), 2)]


def test_waiting_prompts_come_in_round_numbers(counting, monkeypatch):
    monkeypatch.setattr(batching, "STRETCH", 2)
    watched = Watched(counting.programs)
    # Six places: at the first look three groups have left, at the second one more, at the third two.
    lengths = (2, 2, 2, 4, 6, 6, 9, 9, 9, 9, 1)
    rollouts = count(counting, lengths, rows=12, watched=watched)
    np.testing.assert_array_equal(rollouts.tokens, counted(lengths, 2, 40))
    assert watched.named("admit") == [(6,), (4,), (1,), (1,)]


# ---- the device does no more than it must ----


@pytest.mark.parametrize("lengths", [(7,), (3, 1, 7), (1, 1, 1), (33, 34, 2, 2, 2)])
def test_no_step_after_the_last_row_has_ended(counting, lengths):
    watched = Watched(counting.programs)
    count(counting, lengths, watched=watched)
    assert watched.steps() == max(lengths)


def test_rows_that_are_left_move_together_once_they_are_half(counting):
    watched = Watched(counting.programs)
    rollouts = count(counting, (20, 2, 2, 2, 5, 2), group=4, watched=watched)
    np.testing.assert_array_equal(rollouts.tokens, counted((20, 2, 2, 2, 5, 2), 4, 40))
    assert watched.named("keep") == [((2, 4),), ((1, 4),)]
    assert watched.named("decode") == [((6, 4, 48), 2), ((2, 4, 48), 3), ((1, 4, 48), 15)]


def test_one_row_of_a_group_goes_on_alone(model, free):
    made = model("gemma3_text")
    rows = free.tokens.reshape(-1, BUDGET)
    # A stop set that ends every row but one at its first token.
    stop = tuple(set(rows[1:, 0].tolist()) - set(rows[0].tolist()))
    watched = Watched(made.programs)
    drawn(made, stop=stop, programs=watched.programs)
    assert watched.named("keep")[-1] == ((1, 1),)


def test_rings_double_when_they_are_full_and_no_sooner(counting, monkeypatch):
    monkeypatch.setattr(batching, "COLUMNS", 4)
    watched = Watched(counting.programs)
    rollouts = count(counting, (30, 4, 3), watched=watched)
    np.testing.assert_array_equal(rollouts.tokens, counted((30, 4, 3), 2, 40))
    assert watched.named("grow") == [(8,), (16,), (32,)]
    short = Watched(counting.programs)
    count(counting, (4, 4, 3), watched=short)
    assert short.named("grow") == []


def test_other_lengths_in_the_same_buckets_compile_nothing(counting):
    group = 3
    with CompilationCounter() as compilations:
        count(counting, (20, 2, 2, 2, 2), group)
        # The start, the admission, two programs of decoding, one move, and the host's small ones.
        assert 0 < compilations.take().count <= 14
        rollouts = count(counting, (3, 3, 17, 3, 2), group)
        assert compilations.take().count == 0
    np.testing.assert_array_equal(rollouts.tokens, counted((3, 3, 17, 3, 2), group, 40))


# ---- streaming ----


def test_completions_are_handed_on_as_they_end_while_the_device_goes_on(counting, monkeypatch):
    monkeypatch.setattr(batching, "STRETCH", 4)
    watched = Watched(counting.programs)

    def finished(prompt, sample, tokens):
        watched.calls.append(("finished", (prompt, sample, len(tokens)), watched.steps()))

    count(counting, (30, 2, 9), watched=watched, finished=finished)
    # A look after steps 4, 8, 9 (half have ended), 13, ...; what ended before it is told when the next has begun.
    assert watched.named("finished") == [
        *(((1, g, 2), 8) for g in range(2)),
        *(((2, g, 9), 13) for g in range(2)),
        *(((0, g, 30), 30) for g in range(2)),
    ]
