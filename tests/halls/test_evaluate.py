import math
from types import SimpleNamespace

import numpy as np
import pytest

from kardia_jax import evaluate as hall
from kardia_jax.dialogue.spans import Spans, render
from kardia_jax.evaluate import Evaluation, evaluate, held_out_prompts, summarise, write_rows
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, Mark, Verdict
from kardia_jax.rollout.sampling import Controls

NAN = math.nan
NAMES = [criterion.name for criterion in KARDIA_FIVE.criteria]


def answer(emotion: str, reply: str) -> str:
    return render(Spans("they miss it", "loss hurts", emotion, reply))


class MarkedByReply:
    """Marks every criterion with the number that the reply is; silent on any other reply."""

    name = "by reply"

    async def score(self, requests):
        return [
            Verdict(tuple(Mark(name, int(request.reply), "said so") for name in NAMES))
            if request.reply.isdigit()
            else JudgeFailure("too busy", retryable=True)
            for request in requests
        ]


@pytest.fixture
def scripted(monkeypatch):
    """Makes the sampler say the given texts, by prompt; gives the list of (prompts, keys, controls, budget) it saw."""

    def install(prompts, texts):
        said, calls = {prompt.tokens: text for prompt, text in zip(prompts, texts, strict=True)}, []

        def sample(sampler, params, rows, keys, controls, max_new_tokens):
            calls.append((rows, keys, controls, max_new_tokens))
            return SimpleNamespace(texts_P_G=[[said[row]] * keys.shape[1] for row in rows])

        monkeypatch.setattr(hall, "sample", sample)
        return calls

    return install


# Gold labels of the five test dialogues: sad, lonely, sad, lonely, sad.
TEXTS = [answer("sad", "5"), answer("proud", "3"), "not four spans", answer("lonely", "hm"), answer("sad", "1")]


@pytest.fixture
def by_hand(config_of, nano_policy, grader_of, scripted):
    config = config_of({"eval.samples": 1})
    scripted(held_out_prompts(config, nano_policy), TEXTS)
    return evaluate(config, nano_policy, grader_of(judge=MarkedByReply()))


def test_values_by_hand(by_hand):
    values = by_hand.values
    assert values["format_rate"] == (1, 1, 0, 1, 1)
    assert values["emotion_accuracy"] == (1, 0, 0, 1, 1)
    for name in NAMES:
        # Malformed: the lowest mark. No verdict: unknown.
        np.testing.assert_array_equal(values[name], (5, 3, 1, NAN, 1))
    np.testing.assert_allclose(values["reward"], (1, 0.5, 0, NAN, 2 / 3))
    assert list(values) == ["format_rate", "emotion_accuracy", *NAMES, "reward", "judge_failures"]
    assert values["judge_failures"] == (0, 0, 0, 1, 0)
    assert by_hand.gold == ("sad", "lonely", "sad", "lonely", "sad")
    assert by_hand.predicted == ("sad", "proud", None, "lonely", "sad")
    assert by_hand.clusters == tuple(f"test.jsonl:{line}" for line in range(1, 6))


def test_means_by_hand(by_hand):
    means = by_hand.means()
    assert means["format_rate"] == pytest.approx(0.8)
    assert means["emotion_accuracy"] == pytest.approx(0.6)
    assert means["empathy"] == pytest.approx((5 + 3 + 1 + 1) / 4)
    assert means["reward"] == pytest.approx((1 + 0.5 + 0 + 2 / 3) / 4)
    # sad 2 x 2 / 5, lonely 2 x 1 / 3, proud was only predicted.
    assert means["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)


def test_intervals_have_the_means_and_lie_around_them(by_hand):
    intervals = by_hand.intervals(seed=0)
    assert {name: interval.mean for name, interval in intervals.items()} == pytest.approx(by_hand.means())
    assert intervals["format_rate"].low < 0.8 < intervals["format_rate"].high <= 1
    assert summarise([by_hand], seed=0) == intervals


def test_rows_hold_every_answer(by_hand, tmp_path, read_lines):
    write_rows(by_hand, tmp_path / "new" / "answers.jsonl")
    rows = read_lines(tmp_path / "new" / "answers.jsonl")
    assert [row["completion"] for row in rows] == TEXTS
    assert [row["emotion"] for row in rows] == list(by_hand.gold)
    assert rows[0]["marks"] == dict.fromkeys(NAMES, 5)
    # Unknown is null, which any JSON reader knows; NaN is not.
    assert rows[3]["reward"] is None
    assert rows[3]["reasons"] == {"rubric": "no verdict: too busy"}


def evaluation_of(marks, gold="sad", predicted="sad") -> Evaluation:
    count = len(marks)
    where = tuple(f"test:{n}" for n in range(count))
    return Evaluation(where, {"empathy": tuple(marks)}, (gold,) * count, (predicted,) * count, ())


def test_several_seeds_are_summarised_by_their_means():
    # Means 0.4 and 0.6: s = 0.1414, and 12.706 s / sqrt(2) = 1.2706.
    summary = summarise([evaluation_of([0.2, 0.6]), evaluation_of([0.6, NAN])], seed=0)
    assert summary["empathy"] == pytest.approx((0.5, 0.5 - 1.2706, 0.5 + 1.2706), abs=1e-4)
    assert summary["macro_f1"] == (1.0, 1.0, 1.0)


def test_one_seed_is_summarised_over_its_dialogues():
    low, high = summarise([evaluation_of([0.0, 1.0] * 50)], seed=0)["empathy"][1:]
    # 1.96 x 0.5 / sqrt(100) on both sides of one half.
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.03)


@pytest.mark.parametrize("order", [1, -1])
def test_a_seed_without_any_verdict_leaves_the_others_their_mean(order):
    summary = summarise([evaluation_of([2.0, 4.0]), evaluation_of([NAN, NAN])][::order], seed=0)
    assert summary["empathy"].mean == 3.0
    assert math.isnan(summary["empathy"].low)


def test_nothing_but_missing_verdicts_is_unknown():
    assert math.isnan(evaluation_of([NAN, NAN]).means()["empathy"])
    assert math.isnan(summarise([evaluation_of([NAN, NAN])], seed=0)["empathy"].mean)


def test_the_sampler_gets_full_batches_and_keys_of_their_own(config_of, nano_policy, grader_of, scripted):
    config = config_of({"eval.samples": 2, "eval.sampler.temperature": 0.5})
    prompts = held_out_prompts(config, nano_policy)
    calls = scripted(prompts, TEXTS)
    evaluation = evaluate(config, nano_policy, grader_of(judge=MarkedByReply()))
    tokens = [prompt.tokens for prompt in prompts]
    # The last batch is filled up with its own first prompt, whose second answer is dropped.
    assert [rows for rows, *_ in calls] == [tokens[0:2], tokens[2:4], [tokens[4], tokens[4]]]
    assert all(keys.shape == (2, 2) for _, keys, *_ in calls)
    assert len(evaluation.rows) == 5 * 2
    assert evaluation.gold == ("sad", "sad", "lonely", "lonely", "sad", "sad", "lonely", "lonely", "sad", "sad")
    drawn = [tuple(np.asarray(key._base_array)) for _, keys, *_ in calls for key in keys.reshape(-1)]
    assert len(set(drawn)) == 12
    for _, _, controls, budget in calls:
        assert (float(controls.temperature), budget) == (0.5, 8)
        assert isinstance(controls, Controls)


def test_the_last_turn_alone_or_every_turn(config_of, nano_policy, world):
    source = {"data.source": str(world / "train.jsonl")}
    every = held_out_prompts(config_of(source), nano_policy)
    last = held_out_prompts(config_of({**source, "eval.turns": "last"}), nano_policy)
    assert [prompt.turn for prompt in every] == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert [prompt.turn for prompt in last] == [0, 1, 0, 1, 0, 1]


@pytest.mark.usefixtures("every_text_counts")
def test_answers_do_not_depend_on_what_fills_the_last_batch(config_of, nano_policy, grader_of):
    def texts(fields):
        evaluation = evaluate(config_of(fields), nano_policy, grader_of())
        return [row["completion"] for row in evaluation.rows]

    drawn = {"eval.sampler.temperature": 1.0}
    three, four = texts({**drawn, "data.test_limit": 3}), texts({**drawn, "data.test_limit": 4})
    assert len(three) == 3 * 4
    assert three == four[: 3 * 4]
    assert len(set(three)) == 3 * 4
    assert texts({**drawn, "data.test_limit": 3, "run.seed": 1}) != three


@pytest.mark.usefixtures("every_text_counts")
def test_greedy_answers_are_all_alike(config_of, nano_policy, grader_of):
    evaluation = evaluate(config_of({"data.test_limit": 2}), nano_policy, grader_of())
    first, second = (
        [row["completion"] for row in evaluation.rows[:4]],
        [row["completion"] for row in evaluation.rows[4:]],
    )
    assert len(set(first)) == len(set(second)) == 1
