"""Configs that cannot work are refused by the name of the field, with what was wanted, what came and what to do."""

import re

import pytest

from kardia_jax.config import (
    AdvantageConfig,
    AuditConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    JudgeConfig,
    LocalJudgeConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SamplerMeshConfig,
    SftConfig,
)

REFUSED = [
    # class, fields, the field named, what is wanted, what came
    (RunConfig, {"seed": -1}, "run.seed", "[0, 2^31)", "-1"),
    (RunConfig, {"seed": 2**31}, "run.seed", "[0, 2^31)", "2147483648"),
    (RunConfig, {"save_every": 0}, "run.save_every", "at least 1", "0"),
    (RunConfig, {"keep_checkpoints": 0}, "run.keep_checkpoints", "at least 1", "0"),
    (RunConfig, {"log_rollouts": -2}, "run.log_rollouts", "-1 (all), 0 or more", "-2"),
    (DataConfig, {"source": ""}, "data.source", "a file, a folder or a Hub id", "''"),
    (DataConfig, {"max_prompt_tokens": 7}, "data.max_prompt_tokens", "at least 8", "7"),
    (DataConfig, {"train_limit": 0}, "data.train_limit", "none or at least 1", "0"),
    (DataConfig, {"test_limit": 0}, "data.test_limit", "none or at least 1", "0"),
    (ModelConfig, {"head_chunk": 0}, "model.head_chunk", "at least 1", "0"),
    (ModelConfig, {"vocab_chunk": -1}, "model.vocab_chunk", "0 (chosen by platform) or more", "-1"),
    (SamplerConfig, {"temperature": -0.1}, "sampler.temperature", "0 (greedy) or more", "-0.1"),
    (SamplerConfig, {"temperature": float("nan")}, "sampler.temperature", "0 (greedy) or more", "nan"),
    (SamplerConfig, {"top_k": -1}, "sampler.top_k", "0 (off) or more", "-1"),
    (SamplerConfig, {"top_p": 0.0}, "sampler.top_p", "(0, 1]", "0.0"),
    (SamplerConfig, {"top_p": 1.1}, "sampler.top_p", "(0, 1]", "1.1"),
    (SamplerConfig, {"min_p": 1.0}, "sampler.min_p", "[0, 1)", "1.0"),
    (SamplerConfig, {"max_new_tokens": 0}, "sampler.max_new_tokens", "at least 1", "0"),
    (SamplerConfig, {"rows": -1}, "sampler.rows", "0 (all) or more", "-1"),
    (MeshConfig, {"fsdp": 0}, "mesh.fsdp", "at least 1, or -1 for what is left", "0"),
    (MeshConfig, {"data": -1, "tensor": -1}, "mesh", "-1 at most once", "'-1x1x-1'"),
    (SamplerMeshConfig, {"data": -1}, "mesh.sampler.data", "0 (no mesh of its own) or more", "-1"),
    (SamplerMeshConfig, {"data": 1, "fsdp": 0}, "mesh.sampler.fsdp", "at least 1", "0"),
    (SamplerMeshConfig, {"tensor": 2}, "mesh.sampler.data", "at least 1 where fsdp or tensor is set", "0"),
    (GrpoConfig, {"group": 8, "sampler": SamplerConfig(rows=7)}, "grpo.sampler.rows", "at least grpo.group = 8", "7"),
    (RewardConfig, {"emotion": -1.0}, "rewards.emotion", "0 or more", "-1.0"),
    (RewardConfig, {"format": 0, "emotion": 0, "rubric": 0}, "rewards", "one weight above 0", "'rubric': 0"),
    (JudgeConfig, {"max_failure_share": 1.5}, "judge.max_failure_share", "a share in [0, 1]", "1.5"),
    (LocalJudgeConfig, {"max_tokens_per_batch": 32}, "judge.local.max_tokens_per_batch", "at least 64", "32"),
    (LocalJudgeConfig, {"min_mass": 1.5}, "judge.local.min_mass", "a share in [0, 1]", "1.5"),
    (JudgeConfig, {"min_valid": 0}, "judge.min_valid", "at least 1", "0"),
    (OptimizerConfig, {"learning_rate": -1.0}, "optimizer.learning_rate", "0 or more", "-1.0"),
    (OptimizerConfig, {"warmup_share": 1.5}, "optimizer.warmup_share", "a share in [0, 1]", "1.5"),
    (OptimizerConfig, {"final_share": -0.5}, "optimizer.final_share", "a share in [0, 1]", "-0.5"),
    (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1", "[0, 1)", "1.0"),
    (OptimizerConfig, {"beta2": -0.1}, "optimizer.beta2", "[0, 1)", "-0.1"),
    (OptimizerConfig, {"clip_norm": -1.0}, "optimizer.clip_norm", "0 (never) or more", "-1.0"),
    (OptimizerConfig, {"max_bad_steps": 0}, "optimizer.max_bad_steps", "at least 1", "0"),
    (SftConfig, {"epochs": 0.0}, "sft.epochs", "more than 0", "0.0"),
    (SftConfig, {"batch": 0}, "sft.batch", "at least 1", "0"),
    (SftConfig, {"batch": 6, "micro_batches": 4}, "sft.micro_batches", "a divisor of the batch = 6", "4"),
    (SftConfig, {"tokens_per_micro_batch": 0}, "sft.tokens_per_micro_batch", "none or at least 1", "0"),
    (GrpoConfig, {"steps": 0}, "grpo.steps", "none or at least 1", "0"),
    (GrpoConfig, {"lag": 2}, "grpo.lag", "0 or 1", "2"),
    (JudgeConfig, {"failure_window": 0}, "judge.failure_window", "at least 1 step", "0"),
    (AuditConfig, {"every": -1}, "judge.audit.every", "0 (never) or more", "-1"),
    (AuditConfig, {"share": 0.0}, "judge.audit.share", "a share in (0, 1]", "0.0"),
    (AuditConfig, {"every": 1, "kind": "local"}, "judge.audit.local.source", "a directory", "''"),
    (JudgeConfig, {"audit": AuditConfig(every=1)}, "judge.audit.kind", "another judge than the first", "'rules'"),
    (GrpoConfig, {"epochs": -1.0}, "grpo.epochs", "more than 0", "-1.0"),
    (GrpoConfig, {"prompts": 0}, "grpo.prompts", "at least 1", "0"),
    (GrpoConfig, {"group": 0}, "grpo.group", "at least 2", "0"),
    (GrpoConfig, {"passes": 0}, "grpo.passes", "at least 1", "0"),
    (GrpoConfig, {"prompts": 4, "minibatches": 3}, "grpo.minibatches", "a divisor of grpo.prompts = 4", "3"),
    (GrpoConfig, {"prompts": 4, "minibatches": 0}, "grpo.minibatches", "a divisor of grpo.prompts = 4", "0"),
    (GrpoConfig, {"minibatches": 2, "micro_batches": 4}, "grpo.micro_batches", "a divisor of the batch = 2", "4"),
    (
        GrpoConfig,
        {"micro_batches": 4, "tokens_per_micro_batch": 64},
        "grpo.micro_batches",
        "1 with grpo.tokens_per_micro_batch",
        "4",
    ),
    (
        GrpoConfig,
        {"advantage": AdvantageConfig(scale="gdpo"), "loss": LossConfig(overlong_buffer=9)},
        "grpo.loss.overlong_buffer",
        "0 with advantage.scale gdpo",
        "9",
    ),
    (
        GrpoConfig,
        {"sampler": SamplerConfig(temperature=0.0)},
        "grpo.sampler.temperature",
        "more than 0",
        "0.0",
    ),
    (EvalConfig, {"batch": 0}, "eval.batch", "at least 1", "0"),
    (EvalConfig, {"samples": 0}, "eval.samples", "at least 1", "0"),
    (AdvantageConfig, {"epsilon": -1e-4}, "grpo.advantage.epsilon", "0 or more", "-0.0001"),
    (AdvantageConfig, {"min_spread": -1.0}, "grpo.advantage.min_spread", "0 (off) or more", "-1.0"),
    (LossConfig, {"beta": -0.1}, "grpo.loss.beta", "0 (no KL) or more", "-0.1"),
    (LossConfig, {"top_entropy": 0.0}, "grpo.loss.top_entropy", "(0, 1]", "0.0"),
    (LossConfig, {"overlong_buffer": -1}, "grpo.loss.overlong_buffer", "0 (off) or more", "-1"),
    (LossConfig, {"off_policy_threshold": -1.0}, "grpo.loss.off_policy_threshold", "none, or 0 or more", "-1.0"),
    (LossConfig, {"sapo_temperatures": (1.0, 0.0)}, "grpo.loss.sapo_temperatures", "above 0", "(1.0, 0.0)"),
    (LossConfig, {"vespo_positive": (0.0, 3.0)}, "grpo.loss.vespo_positive", "above 0", "(0.0, 3.0)"),
    (LossConfig, {"vespo_negative": (3.0, -2.0)}, "grpo.loss.vespo_negative", "above 0", "(3.0, -2.0)"),
    (LossConfig, {"clip_low": 0.0}, "grpo.loss.clip_low", "none or more than 0", "0.0"),
    (LossConfig, {"clip_low": 1.5}, "grpo.loss.clip_low", "none or at most 1", "1.5"),
    (LossConfig, {"clip_high": -0.1}, "grpo.loss.clip_high", "none or more than 0", "-0.1"),
    (LossConfig, {"delta": 1.0}, "grpo.loss.delta", "none or more than 1", "1.0"),
    (LossConfig, {"dual_clip": 0.5}, "grpo.loss.dual_clip", "none or more than 1", "0.5"),
    (LossConfig, {"cispo_clip": "band"}, "grpo.loss.cispo_clip", "cap with name grpo", "'band'"),
    (LossConfig, {"correction_cap": 0.5}, "grpo.loss.correction_cap", "at least 1", "0.5"),
    (LossConfig, {"correction_floor": 2.0}, "grpo.loss.correction_floor", "in [0, 1]", "2.0"),
    (LossConfig, {"correction": "icepop"}, "grpo.loss.correction_floor", "more than 0 with correction icepop", "0.0"),
    *[
        (
            LossConfig,
            {"name": name, "importance": "sequence"},
            "grpo.loss.importance",
            f"with name {name}",
            "'sequence'",
        )
        for name in ("cispo", "sapo", "vespo")
    ],
    (LossConfig, {"name": "gspo", "importance": "token"}, "grpo.loss.importance", "with name gspo", "'token'"),
    *[
        (LossConfig, {"name": name, "clip_high": 0.3}, "grpo.loss.clip_high", f"none with name {name}", "0.3")
        for name in ("sapo", "vespo")
    ],
    *[
        (LossConfig, {"name": name, "delta": 4.0}, "grpo.loss.delta", f"none with name {name}", "4.0")
        for name in ("cispo", "sapo", "vespo")
    ],
    (LossConfig, {"name": "cispo", "dual_clip": 3.0}, "grpo.loss.dual_clip", "none with name cispo", "3.0"),
    (LossConfig, {"name": "cispo", "clip_high": 0.28}, "grpo.loss.clip_high", "none or at least 1", "0.28"),
    (LossConfig, {"name": "cispo", "clip_low": 0.2}, "grpo.loss.clip_low", "none with cispo_clip cap", "0.2"),
    (
        LossConfig,
        {"name": "vespo", "correction": "sequence_tis"},
        "grpo.loss.correction",
        "one per token with name vespo",
        "'sequence_tis'",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "name", "wanted", "came"), REFUSED)
def test_a_value_that_cannot_work_is_refused_by_name(kind, fields, name, wanted, came):
    with pytest.raises(ConfigError) as refused:
        kind(**fields)
    message = str(refused.value)
    assert message.startswith(f"{name}: wanted ")
    assert wanted in message
    assert re.search(rf", got .*{re.escape(came)}.*\.", message)


@pytest.mark.parametrize(
    ("kind", "fields", "fix"),
    [
        (LossConfig, {"name": "cispo", "importance": "sequence"}, "use name gspo"),
        (GrpoConfig, {"prompts": 4, "minibatches": 3}, "Pick a divisor of grpo.prompts"),
        (GrpoConfig, {"group": 4, "sampler": SamplerConfig(rows=3)}, "A group is never split"),
        (GrpoConfig, {"sampler": SamplerConfig(temperature=0.0)}, "set grpo.sampler.temperature above 0"),
        (SftConfig, {"batch": 6, "micro_batches": 4}, "Pick a divisor of 6"),
    ],
)
def test_an_impossible_combination_says_what_to_do(kind, fields, fix):
    with pytest.raises(ConfigError, match=fix):
        kind(**fields)


def test_an_error_is_a_sentence_with_name_wanted_came_and_fix():
    assert str(ConfigError("a.b", "more", 0, "Add one.")) == "a.b: wanted more, got 0. Add one."
    assert str(ConfigError("a.b", "more", "x")) == "a.b: wanted more, got 'x'."
