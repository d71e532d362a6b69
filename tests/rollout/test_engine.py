"""Padding to buckets, what the sampler is handed, and texts that are what was drawn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax import programs
from kardia_jax.config import ModelConfig, SamplerConfig
from kardia_jax.dialogue.spans import END_TAG, TAGS, Spans, parse, render
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.policy import Compute, init
from kardia_jax.model.shapes import SHAPES
from kardia_jax.model.spec import ModelSpec
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.policies import Policy, load_tokenizer
from kardia_jax.rollout.engine import SHORTEST, Sampled, Sampler, pad_rows, sample
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import Rollouts

TOKENIZER = load_tokenizer(ModelConfig().tokenizer)
IM_END, PAD = TOKENIZER.convert_tokens_to_ids("<|im_end|>"), TOKENIZER.pad_token_id
POLICY = Policy(SHAPES["tiny-qwen3"].with_tokens(len(TOKENIZER)), {}, TOKENIZER, (IM_END,))
CONTROLS = Controls.from_config(SamplerConfig())
REPLY = render(Spans("lost a pet", "grief needs room", "sad", "I am sorry."))


def sampler_with(generate) -> Sampler:
    return Sampler(generate, TOKENIZER, POLICY.stop_ids, POLICY.silent_ids, POLICY.pad_id)


class Canned:
    """Stands in for the compiled sampler: remembers what it was handed and answers with fixed completions, which end
    in the order of their lengths."""

    def __init__(self, completions: list[list[list[int]]], budget: int, filler: int = PAD):
        self.lengths = np.array([[len(ids) for ids in group] for group in completions], np.int32)
        self.tokens = np.full((*self.lengths.shape, budget), filler, np.int32)
        for place in np.ndindex(self.lengths.shape):
            ids = completions[place[0]][place[1]]
            self.tokens[place][: len(ids)] = ids

    def __call__(self, params, tokens, lengths, keys, controls, stop_ids, pad_id, max_new_tokens, finished) -> Rollouts:
        self.handed: dict[str, Any] = locals()
        for place in sorted(np.ndindex(self.lengths.shape), key=lambda place: self.lengths[place]):
            finished(*place, self.tokens[place][: self.lengths[place]])
        logprobs = np.arange(self.tokens.size, dtype=np.float32).reshape(self.tokens.shape)
        return Rollouts(self.tokens, self.lengths, -logprobs, -2 * logprobs, np.ones(self.lengths.shape, bool))


def row_keys_for(prompts: int, group: int):
    return row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(prompts), group)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


# ---- padding ----


@pytest.mark.parametrize(
    ("longest", "padded"), [(1, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (49, 64), (1500, 1536)]
)
def test_rows_are_padded_to_the_bucket_of_the_longest(longest, padded):
    tokens, lengths = pad_rows([[5], list(range(longest))], pad_id=7)
    assert tokens.shape == (2, padded)
    assert lengths.tolist() == [1, longest]
    assert tokens[0].tolist() == [5] + [7] * (padded - 1)
    assert tokens[1].tolist() == [*range(longest), *[7] * (padded - longest)]


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.lists(st.integers(0, 99), max_size=70), min_size=1, max_size=5), pad_id=st.integers(0, 99))
def test_padding_loses_nothing_and_wastes_less_than_half(rows, pad_id):
    tokens, lengths = pad_rows(rows, pad_id)
    assert [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)] == rows
    assert all((row[n:] == pad_id).all() for row, n in zip(tokens, lengths, strict=True))
    assert tokens.shape[1] <= max(SHORTEST, lengths.max() * 3 // 2)
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int32)


# ---- texts ----


def test_a_completion_ends_at_an_end_of_turn_or_at_the_end_tag_of_the_response():
    end_tag = TOKENIZER.convert_tokens_to_ids(END_TAG)
    assert set(POLICY.stop_ids) == {IM_END, end_tag}
    assert end_tag not in POLICY.silent_ids


def texts_of(completions: list[list[list[int]]], filler: int = PAD) -> list[list[str]]:
    sampler, keys = sampler_with(Canned(completions, 64, filler)), row_keys_for(len(completions), len(completions[0]))
    return sample(sampler, {}, [[1, 2]] * len(completions), keys, CONTROLS, max_new_tokens=64).texts_P_G


def test_texts_keep_span_tags_and_lose_the_end_of_turn():
    ended = [*ids_of("No tags."), IM_END]
    texts = texts_of([[ids_of(REPLY), ended], [[*ids_of(REPLY), IM_END], [IM_END]]])
    assert texts == [[REPLY, "No tags."], [REPLY, ""]]
    assert parse(texts[0][0]) == Spans("lost a pet", "grief needs room", "sad", "I am sorry.")
    assert all(texts[0][0].count(tag) == 1 for tag in TAGS)


def test_special_tokens_that_do_not_end_a_completion_stay_to_be_seen():
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    odd = [*ids_of("Odd"), start, PAD, *ids_of(" turn"), IM_END]
    assert texts_of([[odd, [PAD, PAD]]]) == [["Odd<|im_start|><|endoftext|> turn", "<|endoftext|>"]]


def test_what_lies_behind_a_completion_is_never_read():
    noise = ids_of("noise")[0]
    assert texts_of([[ids_of("Yes."), ids_of("No, not at all.")]], noise) == [["Yes.", "No, not at all."]]


def test_each_text_is_handed_on_as_it_ends():
    canned, heard = Canned([[ids_of("Not at all."), [IM_END]], [ids_of("Yes."), ids_of(REPLY)]], 64), []
    out = sample(
        sampler_with(canned), {}, [[1], [2]], row_keys_for(2, 2), CONTROLS, 64, lambda *told: heard.append(told)
    )
    assert heard == [(0, 1, ""), (1, 0, "Yes."), (0, 0, "Not at all."), (1, 1, REPLY)]
    assert out.texts_P_G == [["Not at all.", ""], ["Yes.", REPLY]]


# ---- one call of the sampler ----


def test_the_sampler_is_handed_padded_prompts_and_everything_else_as_it_came():
    canned, keys = Canned([[[5, IM_END]], [[6, IM_END]]], 20), row_keys_for(2, 1)
    params = {"some": "parameters"}
    out = sample(sampler_with(canned), params, [list(range(17)), [4, 5]], keys, CONTROLS, max_new_tokens=20)
    handed = canned.handed
    assert handed["tokens"].shape == (2, 24)
    assert handed["tokens"][1].tolist() == [4, 5] + [PAD] * 22
    assert handed["lengths"].tolist() == [17, 2]
    assert (handed["params"], handed["keys"], handed["controls"]) == (params, keys, CONTROLS)
    assert handed["stop_ids"] == POLICY.stop_ids
    assert (handed["pad_id"], handed["max_new_tokens"]) == (PAD, 20)
    np.testing.assert_array_equal(out.prompt_tokens, handed["tokens"])
    np.testing.assert_array_equal(out.prompt_lengths, handed["lengths"])


@pytest.mark.parametrize(("longest", "budget", "kept"), [(3, 64, 16), (17, 64, 24), (60, 64, 64), (30, 30, 30)])
def test_rollouts_are_cut_to_the_bucket_of_the_longest_completion(longest, budget, kept):
    canned = Canned([[[9] * longest, [8]]], budget)
    out = sample(sampler_with(canned), {}, [[1]], row_keys_for(1, 2), CONTROLS, max_new_tokens=budget)
    assert out.rollouts.lengths.tolist() == [[longest, 1]]
    np.testing.assert_array_equal(out.rollouts.tokens, canned.tokens[..., :kept])
    places = np.arange(2 * budget).reshape(1, 2, budget)[..., :kept]
    np.testing.assert_array_equal(out.rollouts.sampler_logprobs, -places)
    np.testing.assert_array_equal(out.rollouts.tempered_logprobs, -2 * places)


def test_prompts_of_one_bucket_compile_once_and_texts_are_the_tokens():
    spec = ModelSpec("qwen3", 3200, 8, 8, 1, 2, 1, 4, max_positions=64, token_count=len(TOKENIZER))
    shapes = jax.eval_shape(functools.partial(init, spec), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes)
    sampler = sampler_with(programs.make_generate(spec, Compute(remat="none")))

    def sampled(n: int, m: int) -> Sampled:
        return sample(sampler, params, [[1] * n, [2] * m], row_keys_for(2, 2), CONTROLS, max_new_tokens=4)

    with CompilationCounter() as compilations:
        outs = [sampled(3, 16)]
        assert compilations.take().count > 0
        outs += [sampled(9, 1), sampled(16, 16)]
        assert compilations.take().count == 0
    for out in outs:
        rows = zip(out.rollouts.tokens.reshape(4, -1), out.rollouts.lengths.ravel(), strict=True)
        wanted = [TOKENIZER.decode(row[: n - 1] if row[n - 1] in (IM_END, PAD) else row[:n]) for row, n in rows]
        assert [text for group in out.texts_P_G for text in group] == wanted
