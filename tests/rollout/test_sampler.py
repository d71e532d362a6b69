"""The sampler against the plain forward pass; stopping, early exit, keys that no neighbour disturbs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import SamplerConfig
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.decoding import Storage, quantized
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.rollout.sampling import Controls

LOGPROB_TOLERANCE = 1e-4
"""float32, sampler against learner (the issue's bound)."""
MISMATCH = 1.05
"""Mean of exp|difference| in bfloat16, or with 8 bits (the reliability goal)."""

FAMILIES = ("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text")
TOKENS, BUDGET, PAD = 90, 6, 89
LENGTHS = np.array([8, 5, 1], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, TOKENS, (3, 8)).astype(np.int32)
NEVER = (-1,) * 6
KEYS = row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(3), 2)


def rollout_keys(step: int, prompts: range):
    return row_keys(0, Purpose.ROLLOUT, step, jnp.array(prompts), 2)


def controls(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Controls:
    return Controls.from_config(SamplerConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))


def run(made, filters=None, stop=NEVER, keys=KEYS, prompts=PROMPTS, lengths=LENGTHS, pad=PAD, budget: int = BUDGET):
    filters = controls() if filters is None else filters
    return made.generate(made.params, prompts, lengths, keys, filters, stop, pad, max_new_tokens=budget)


def learner_logprobs(made, rollouts, temperature: float, params=None, lengths=LENGTHS) -> np.ndarray:
    prompt_lengths = np.repeat(lengths[:, None], 2, 1)
    keep = np.arange(BUDGET) < rollouts.lengths[..., None]
    batch = (PROMPTS, prompt_lengths, rollouts.tokens, keep, jnp.float32(temperature))
    return np.asarray(made.logprobs(made.params if params is None else params, *batch)[0])


def plain_logits(made, tokens: np.ndarray) -> np.ndarray:
    """[P, G, T, V]: what ordinary rows of prompt and completion say before each completion token."""
    places = list(itertools.product(range(3), range(2)))
    rows = np.zeros((6, 8 + BUDGET), np.int32)
    for row, (p, g) in zip(rows, places, strict=True):
        row[: LENGTHS[p]], row[LENGTHS[p] : LENGTHS[p] + BUDGET] = PROMPTS[p, : LENGTHS[p]], tokens[p, g]
    z = np.asarray(made.logits(made.params, rows, jnp.full(6, 8 + BUDGET)))
    cut = [z[i, LENGTHS[p] - 1 : LENGTHS[p] - 1 + BUDGET] for i, (p, _) in enumerate(places)]
    return np.stack(cut).reshape(3, 2, BUDGET, -1)


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---- log-probs ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_learners(model, family, temperature):
    made = model(family)
    rollouts = run(made, controls(temperature))
    wanted = learner_logprobs(made, rollouts, temperature)
    np.testing.assert_allclose(rollouts.sampler_logprobs, wanted, atol=LOGPROB_TOLERANCE)
    np.testing.assert_allclose(rollouts.tempered_logprobs, wanted, atol=LOGPROB_TOLERANCE)
    assert wanted.std() > 0.5, "log-probs that hardly differ would prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_follows_the_argmax_of_the_plain_logits_at_the_learners_logprobs(model, family):
    made = model(family)
    rollouts = run(made, controls(0.0))
    z = plain_logits(made, rollouts.tokens)
    np.testing.assert_array_equal(rollouts.tokens, z[..., :TOKENS].argmax(-1))
    np.testing.assert_array_equal(rollouts.sampler_logprobs, 0)
    np.testing.assert_allclose(
        rollouts.tempered_logprobs, learner_logprobs(made, rollouts, 1.0), atol=LOGPROB_TOLERANCE
    )


def test_logprobs_agree_up_to_a_stop_and_are_zero_behind_it(model):
    made = model("qwen3")
    free = run(made)
    rollouts = run(made, stop=tuple(free.tokens[:, :, [1, 3]].ravel()[:6]))
    assert 1 <= rollouts.lengths.min() < rollouts.lengths.max()
    wanted = learner_logprobs(made, rollouts, 1.0)
    np.testing.assert_allclose(rollouts.sampler_logprobs, wanted, atol=LOGPROB_TOLERANCE)
    behind = np.arange(BUDGET) >= rollouts.lengths[..., None]
    assert (rollouts.sampler_logprobs[behind] == 0).all()
    assert (rollouts.tempered_logprobs[behind] == 0).all()


def test_bfloat16_mismatch_stays_small(model):
    made = model("qwen3", "bfloat16")
    rollouts = run(made)
    gap = np.abs(rollouts.sampler_logprobs - learner_logprobs(made, rollouts, 1.0))
    assert np.exp(gap).mean() < MISMATCH


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 3, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.15), (0.9, 20, 0.8, 0.05)],
)
def test_filtered_logprobs_are_renormalised_and_tempered_ones_are_not(model, temperature, top_k, top_p, min_p):
    made = model("qwen3")
    rollouts = run(made, controls(temperature, top_k, top_p, min_p))
    logp = log_softmax(plain_logits(made, rollouts.tokens)[..., :TOKENS] / temperature)
    tempered = np.take_along_axis(logp, rollouts.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(rollouts.tempered_logprobs, tempered, atol=LOGPROB_TOLERANCE)
    kept = np.apply_along_axis(lambda row: kept_mass(row, top_k, top_p, min_p), -1, logp)
    np.testing.assert_allclose(rollouts.sampler_logprobs, tempered - np.log(kept), atol=LOGPROB_TOLERANCE)
    assert kept.min() < 0.9, "filters that drop nothing would prove nothing"


def kept_mass(logp: np.ndarray, top_k: int, top_p: float, min_p: float) -> float:
    """Probability of the tokens that the filters keep, out of all."""
    p = np.sort(np.exp(logp.astype(np.float64)))[::-1]
    p = p[:top_k] if top_k else p
    nucleus = 1 + int(np.searchsorted(np.cumsum(p / p.sum()), top_p)) if top_p < 1 else len(p)
    return float(p[:nucleus][p[:nucleus] >= min_p * p[0]].sum())


# ---- what is kept in fewer bits ----


@pytest.mark.parametrize("storage", [Storage(kv="bfloat16"), Storage(kv="int8"), Storage("int8", "int8")])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_fewer_bits_change_log_probs_and_not_by_much(model, family, storage):
    made = model(family, storage=storage)
    rollouts = run(made)
    gap = np.abs(rollouts.sampler_logprobs - learner_logprobs(made, rollouts, 1.0))
    assert gap.max() > LOGPROB_TOLERANCE, "nothing was rounded"
    assert np.exp(gap).mean() < MISMATCH


def test_log_probs_under_int8_kernels_are_those_of_the_rounded_model(model):
    made = model("qwen3", storage=Storage(weights="int8"))
    # The prompt is run by the kernels as they are; of a prompt of one token that is nothing.
    one = np.ones(3, np.int32)
    rollouts = run(made, controls(0.8), lengths=one)
    blocks = made.params["blocks"]
    layers = [quantized(jax.tree.map(lambda leaf, i=i: leaf[i], blocks)) for i in range(2)]
    rounded = made.params | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(widened, layers))}
    wanted = learner_logprobs(made, rollouts, 0.8, rounded, one)
    np.testing.assert_allclose(rollouts.sampler_logprobs, wanted, atol=LOGPROB_TOLERANCE)
    assert np.abs(wanted - learner_logprobs(made, rollouts, 0.8, None, one)).max() > 10 * LOGPROB_TOLERANCE


def widened(node):
    """The same tree with kernels of int8 multiplied out."""
    if "kernel_scale" not in node:
        return {name: widened(one) if isinstance(one, dict) else one for name, one in node.items()}
    return {"kernel": node["kernel"] * node["kernel_scale"]} | {k: v for k, v in node.items() if k == "bias"}


# ---- what may be drawn, and when it ends ----


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_rows_of_the_table_are_never_sampled(model, family):
    made = model(family)
    hot = run(made, controls(5.0))
    assert (plain_logits(made, hot.tokens).argmax(-1) >= TOKENS).any(), "they would have been"
    for rollouts in (hot, run(made, controls(0.0)), run(made, controls(5.0, top_k=95))):
        assert (rollouts.tokens < TOKENS).all()
        assert np.isfinite(rollouts.sampler_logprobs).all()


def ended(free, stop: tuple[int, ...], pad: int):
    """The free run cut by hand behind each row's first stop token."""
    cut = {name: getattr(free, name).copy() for name in ("tokens", "sampler_logprobs", "tempered_logprobs")}
    lengths, stopped = np.full(KEYS.shape, BUDGET), np.zeros(KEYS.shape, bool)
    for p, g in np.ndindex(*KEYS.shape):
        at = [t for t in range(BUDGET) if free.tokens[p, g, t] in stop]
        if at:
            lengths[p, g], stopped[p, g] = at[0] + 1, True
        for name, filler in (("tokens", pad), ("sampler_logprobs", 0), ("tempered_logprobs", 0)):
            cut[name][p, g, lengths[p, g] :] = filler
    return cut | {"lengths": lengths, "stopped": stopped}


@settings(deadline=None, max_examples=40)
@given(places=st.sets(st.integers(0, 6 * BUDGET - 1), max_size=4), pad_is_a_stop=st.booleans())
def test_a_row_ends_behind_the_first_token_of_the_stop_set(model, places, pad_is_a_stop):
    # Stop tokens are picked from what rows draw anyway: other rows meet them later, in another place or never.
    free = run(model("qwen3"))
    stop = tuple(free.tokens.ravel()[sorted(places)]) + ((PAD,) if pad_is_a_stop else ())
    rollouts = run(model("qwen3"), stop=stop + (-1,) * (6 - len(stop)))
    # Rows that are left move together, and sums over another batch round differently.
    for name, wanted in ended(free, stop, PAD).items():
        tolerance = LOGPROB_TOLERANCE if name.endswith("logprobs") else 0
        np.testing.assert_allclose(getattr(rollouts, name), wanted, atol=tolerance, err_msg=name)


def test_without_a_stop_the_budget_ends_every_row(model):
    rollouts = run(model("qwen3"))
    assert (rollouts.lengths == BUDGET).all()
    assert not rollouts.stopped.any()


def test_a_stop_in_the_last_place_counts_as_stopped(model):
    free = run(model("qwen3"))
    places = [place for place in np.ndindex(3, 2) if free.tokens[place][-1] not in free.tokens[place][:-1]]
    rollouts = run(model("qwen3"), stop=(free.tokens[places[0]][-1], *NEVER[1:]))
    assert (rollouts.lengths[places[0]], rollouts.stopped[places[0]]) == (BUDGET, True)


@pytest.mark.parametrize("rows", [0, 1])
def test_one_completion_of_one_token_and_no_stop_at_all(model, rows):
    made = model("qwen3", rows=rows)
    free, one = run(made), run(made, stop=(), keys=KEYS[:, :1], budget=1)
    np.testing.assert_array_equal(one.tokens, free.tokens[:, :1, :1])
    np.testing.assert_allclose(one.sampler_logprobs, free.sampler_logprobs[:, :1, :1], atol=LOGPROB_TOLERANCE)
    assert one.lengths.tolist() == [[1]] * 3
    assert not one.stopped.any()


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_rows_that_all_stop_at_once(model, rows):
    made = model("qwen3", rows=rows)
    first = run(made).tokens[..., :1]
    rollouts = run(made, stop=tuple(first.ravel()))
    np.testing.assert_array_equal(rollouts.tokens, np.pad(first, ((0, 0), (0, 0), (0, 5)), constant_values=PAD))
    assert (rollouts.lengths == 1).all()
    assert rollouts.stopped.all()


# ---- keys ----


def test_the_same_keys_draw_the_same_bits(model):
    first, again = run(model("qwen3")), run(model("qwen3"), keys=rollout_keys(0, range(3)))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    "keys",
    [
        rollout_keys(1, range(3)),
        row_keys(0, Purpose.EVALUATION, 0, jnp.arange(3), 2),
        row_keys(1, Purpose.ROLLOUT, 0, jnp.arange(3), 2),
        rollout_keys(0, range(3, 6)),
        KEYS[:, ::-1],
    ],
    ids=["step", "purpose", "seed", "prompt", "sample"],
)
def test_other_keys_draw_other_completions(model, keys):
    flat, made = controls(3.0), model("qwen3")
    assert (run(made, flat).tokens != run(made, flat, keys=keys).tokens).any(-1).all()


def test_one_key_draws_afresh_at_every_position(model):
    # A flat distribution: the same uniform number at every position would draw nearly the same token each time.
    tokens = run(model("qwen3"), controls(50.0)).tokens
    assert all(len(set(row)) > BUDGET // 2 for row in tokens.reshape(-1, BUDGET).tolist())


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_prompts_and_samples_does_not_matter(model, order):
    straight = run(model("qwen3"))
    moved = run(model("qwen3"), keys=KEYS[jnp.array(order), ::-1], prompts=PROMPTS[order], lengths=LENGTHS[order])
    np.testing.assert_array_equal(moved.tokens, straight.tokens[order, ::-1])
    np.testing.assert_allclose(moved.sampler_logprobs, straight.sampler_logprobs[order, ::-1], atol=LOGPROB_TOLERANCE)


def test_other_prompts_in_the_batch_do_not_matter(model):
    others = PROMPTS.copy()
    others[[0, 2]] = (others[[0, 2]] + 1) % TOKENS
    rollouts = run(model("qwen3"), keys=KEYS.at[jnp.array([0, 2])].set(rollout_keys(9, range(2))), prompts=others)
    np.testing.assert_array_equal(rollouts.tokens[1], run(model("qwen3")).tokens[1])
    assert (rollouts.tokens[0] != run(model("qwen3")).tokens[0]).any()


@pytest.mark.parametrize("filler", [0, 77])
def test_a_row_alone_with_more_padding_and_a_larger_budget_draws_the_same(model, filler):
    together = run(model("qwen3"), controls(0.8))
    for p in (1, 2):
        prompt = np.where(np.arange(12) < LENGTHS[p], np.pad(PROMPTS[p], (0, 4)), filler)[None]
        one = {"prompts": prompt, "lengths": LENGTHS[[p]], "keys": KEYS[p : p + 1, 1:], "budget": 9}
        alone = run(model("qwen3"), controls(0.8), **one)
        np.testing.assert_array_equal(alone.tokens[0, 0, :BUDGET], together.tokens[p, 1])
        np.testing.assert_allclose(
            alone.sampler_logprobs[0, 0, :BUDGET], together.sampler_logprobs[p, 1], atol=LOGPROB_TOLERANCE
        )


def test_controls_keys_and_stop_ids_compile_nothing(model):
    made, keys = model("qwen2"), rollout_keys(5, range(3))
    several = [controls(), controls(0.0), controls(0.5, 7), controls(1.0, 0, 0.4), controls(2.0, 500, 0.9, 0.2)]
    run(made)
    with CompilationCounter() as compilations:
        for filters in several:
            run(made, filters, stop=tuple(range(90, 96)), keys=keys, lengths=LENGTHS[::-1], pad=1)
        assert compilations.take().count == 0
