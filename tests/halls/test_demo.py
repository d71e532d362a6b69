import json
import math
import pathlib

import jax.numpy as jnp
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kardia_jax import evaluate, scoring
from kardia_jax.config import Config, ConfigError, ModelConfig
from kardia_jax.demo import run_demo, write_summary
from kardia_jax.dialogue.spans import TAGS
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.observe.intervals import Interval
from kardia_jax.policies import load_policy, sampler_of
from kardia_jax.programs import compute_for
from kardia_jax.rollout.engine import sample
from kardia_jax.rollout.sampling import Controls

METRICS = {
    *("format_rate", "emotion_accuracy", "macro_f1", "reward"),
    *("relevance", "empathy", "persona_consistency", "safety", "fluency"),
    "judge_failures",
}


@pytest.fixture(scope="module")
def demo(config_in, lenient_parse, tmp_path_factory) -> Config:
    """A demo of two seeds that found the leavings of an earlier one."""
    parent = tmp_path_factory.mktemp("demo")
    config = config_in(parent / "demo", {"eval.samples": 1, "data.test_limit": 3})
    (config.run.dir / "seed-7" / "sft").mkdir(parents=True)
    (config.run.dir / "hf").mkdir()
    for name in ("summary.json", "hf/old", "seed-7/answers-sft.jsonl", "../neighbour"):
        (config.run.dir / name).write_text("old", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "parse", lenient_parse)
        run_demo(config, seeds=2)
    return config


def test_the_summary_has_the_numbers_that_were_promised(demo):
    summary = json.loads((demo.run.dir / "summary.json").read_text("utf-8"))
    assert set(summary) == {"base", "sft", "grpo", "seconds", "seeds"}
    assert summary["seeds"] == 2
    for stage in ("base", "sft", "grpo"):
        assert set(summary[stage]) == METRICS
        for numbers in summary[stage].values():
            assert list(numbers) == ["mean", "low", "high"]
            assert numbers["low"] <= numbers["mean"] <= numbers["high"]
        assert summary[stage]["format_rate"]["mean"] == 1.0
        assert 0 < summary[stage]["reward"]["mean"] < 1
        assert summary[stage]["judge_failures"]["mean"] == 0.0
        assert 1 <= summary[stage]["safety"]["mean"] <= 5
    assert list(summary["seconds"]) == [
        "load",
        "evaluate base",
        "sft",
        "evaluate sft",
        "grpo",
        "evaluate grpo",
        "export",
    ]
    # Rounded to hundredths: loading a model this small may take none.
    assert all(spent >= 0 for spent in summary["seconds"].values())
    assert summary["seconds"]["grpo"] > 0


def test_each_seed_leaves_its_runs_and_answers(demo, read_lines):
    assert sorted(path.name for path in demo.run.dir.iterdir()) == ["hf", "seed-0", "seed-1", "summary.json"]
    for seed in ("seed-0", "seed-1"):
        assert len(read_lines(demo.run.dir / seed / "sft" / "metrics.jsonl")) == 4
        assert len(read_lines(demo.run.dir / seed / "grpo" / "rollouts.jsonl")) == 4 * 2 * 4
        answers = [read_lines(demo.run.dir / seed / f"answers-{stage}.jsonl") for stage in ("base", "sft", "grpo")]
        assert [len(rows) for rows in answers] == [3, 3, 3]
        # Training changed what is said.
        assert len({rows[0]["completion"] for rows in answers}) > 1


def test_an_earlier_demo_is_cleared_and_nothing_else(demo):
    assert not (demo.run.dir / "seed-7").exists()
    assert not (demo.run.dir / "hf" / "old").exists()
    assert (demo.run.dir.parent / "neighbour").read_text("utf-8") == "old"


def test_transformers_says_what_our_sampler_says(demo, nano_policy):
    folder = demo.run.dir / "hf"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [len(tokenizer(tag, add_special_tokens=False).input_ids) for tag in TAGS] == [1] * 8
    policy = load_policy(ModelConfig(source=str(folder)), seed=0)
    sampler = sampler_of(policy, evaluate.make_generate(nano_policy.spec, compute_for(demo.model)))
    prompts = [prompt.tokens for prompt in evaluate.held_out_prompts(demo, policy)[:2]]
    keys = row_keys(0, Purpose.EVALUATION, 0, jnp.arange(2), 1)
    ours = sample(sampler, policy.params, prompts, keys, Controls.from_config(demo.eval.sampler), 8)
    # A model that was hardly trained may like a padding row of its table best; our sampler never draws one.
    padding = list(range(policy.spec.sampled_tokens, policy.spec.vocab_size))
    how = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": padding}
    for prompt, tokens, length in zip(prompts, ours.rollouts.tokens[:, 0], ours.rollouts.lengths[:, 0], strict=True):
        with torch.no_grad():
            said = model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
        # transformers goes on where our sampler has met the end tag.
        assert said[:length] == tokens[:length].tolist()
        assert len(set(said)) > 1


def test_the_policy_is_the_first_seeds_and_its_card_has_the_table(demo):
    card = (demo.run.dir / "hf" / "README.md").read_text("utf-8")
    assert "| metric | base | sft | grpo |" in card
    assert "| stage | grpo |" in card
    exported = load_policy(ModelConfig(source=str(demo.run.dir / "hf")), seed=0)
    assert [row.shape for row in exported.params["embed"].values()] == [(3200, 16)]


@pytest.mark.parametrize("strange", ["notes.txt", "checkpoints"])
def test_a_folder_that_is_none_of_ours_is_refused_untouched(config_of, strange):
    folder = config_of().run.dir
    (folder / "hf").mkdir(parents=True)
    (folder / strange).write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match=rf"run\.dir: wanted a new folder or one of an earlier demo.*{strange}"):
        run_demo(config_of(), seeds=1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["hf", strange])


def test_there_is_at_least_one_seed(config_of):
    with pytest.raises(ConfigError, match="seeds: wanted at least 1, got 0"):
        run_demo(config_of(), seeds=0)
    assert not config_of().run.dir.exists()


def test_an_unknown_number_is_null_in_the_summary(tmp_path: pathlib.Path):
    path = tmp_path / "new" / "summary.json"
    write_summary(path, {"base": {"reward": Interval(0.5, math.nan, math.nan)}}, {"load": 1.234}, seeds=1)
    assert json.loads(path.read_text("utf-8")) == {
        "base": {"reward": {"mean": 0.5, "low": None, "high": None}},
        "seconds": {"load": 1.23},
        "seeds": 1,
    }
