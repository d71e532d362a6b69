import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kardia_jax.config import (
    AdvantageConfig,
    AlarmConfig,
    AuditConfig,
    CacheConfig,
    Config,
    ConfigError,
    DataConfig,
    EndpointConfig,
    EvalConfig,
    GrpoConfig,
    JudgeConfig,
    JudgeSamplingConfig,
    LocalJudgeConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RemoteConfig,
    ReplayConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SamplerMeshConfig,
    SftConfig,
    TrafficConfig,
    flat,
    from_json,
    to_json,
)
from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective, init_state, sft_objective
from kardia_jax.model.decoding import Storage
from kardia_jax.model.policy import init
from kardia_jax.model.shapes import SHAPES
from kardia_jax.model.spec import ModelSpec
from kardia_jax.programs import compute_for, make_compiled_update, make_generate
from kardia_jax.rollout.sampler import Drawn
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import GroupBatch

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

# ---- what is refused: class, fields, the field named, what is wanted, what came

REFUSED = [
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


def leaf_types(kind: type, prefix: str = "") -> dict[str, object]:
    """Dotted field to annotation, over the whole tree."""
    out: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory() if callable(field.default_factory) else field.default
        inner = dataclasses.is_dataclass(made)
        out |= leaf_types(type(made), f"{prefix}{field.name}.") if inner else {prefix + field.name: field.type}
    return out


CHOICES = sorted(name for name, kind in leaf_types(Config).items() if "Literal" in str(kind))


def with_field(config, path: str, value: object):
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: with_field(getattr(config, name), rest, value) if rest else value})


def test_the_fields_with_choices_are_found():
    assert len(CHOICES) >= 15
    assert {"judge.kind", "grpo.loss.name", "model.dtype", "sft.optimizer.schedule", "run.trackers"} <= set(CHOICES)


@pytest.mark.parametrize("field", CHOICES)
def test_a_python_config_cannot_name_a_choice_that_is_none(field):
    wrong = ("nonsense",) if field == "run.trackers" else "nonsense"
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)}: wanted .*got '?.*nonsense"):
        with_field(Config(), field, wrong)


def test_an_error_is_a_sentence_with_name_wanted_came_and_fix():
    assert str(ConfigError("a.b", "more", 0, "Add one.")) == "a.b: wanted more, got 0. Add one."
    assert str(ConfigError("a.b", "more", "x")) == "a.b: wanted more, got 'x'."


def test_ratio_bounds_by_preset():
    assert LossConfig().ratio_bounds == (0.8, 1.2)
    assert LossConfig(name="dapo").ratio_bounds == (0.8, 1.28)
    assert LossConfig(name="gspo").ratio_bounds == (1 - 3e-4, 1 + 4e-4)
    assert LossConfig(name="cispo").ratio_bounds == (0.0, 5.0)
    assert LossConfig(name="cispo", cispo_clip="band", clip_high=0.3).ratio_bounds == (0.8, 1.3)
    assert LossConfig(name="vespo").ratio_bounds == (0.0, float("inf"))
    assert LossConfig(clip_low=0.1, clip_high=0.5).ratio_bounds == (0.9, 1.5)


# ---- there and back

OTHER_OPTIMIZER = OptimizerConfig(3e-3, "linear", 0.25, 0.125, 0.5, 0.75, 1e-6, 0.0, 2.0, 7, None, "bfloat16", True)
OTHER = Config(
    run=RunConfig(pathlib.Path("runs/é x"), 7, True, 3, 4, -1, False, ("wandb", "mlflow"), "off"),
    data=DataConfig("data/x.jsonl", "skip", pathlib.Path("p.txt"), "spans", 64, "skip", 10, 5),
    model=ModelConfig(
        *("out/hf", "out/tokenizer", "bfloat16", "xla", "dots", 16, 32, 3),
        lora=LoraConfig(8, 32.0, ("q_proj", "v_proj"), 0.25, "rslora", "bfloat16"),
    ),
    mesh=MeshConfig(2, 4, -1, SamplerMeshConfig(3, 2, 5)),
    rewards=RewardConfig(0.5, 0.25, 0.125),
    judge=JudgeConfig(
        kind="replay",
        rubric="rubrics/mine.yaml",
        record=pathlib.Path("verdicts.jsonl"),
        endpoint=EndpointConfig(("http://a:1/v1", "http://b:2/v1"), "m", "A_KEY", "none", '{"top_k": 1}', 0.5, 2.0),
        sampling=JudgeSamplingConfig(None, 512, "max_completion_tokens", 5, 3),
        traffic=TrafficConfig(8, 60, 90_000, 20.0, 100.0, 3, 0.1, 5, 0.25, 10.0, 4, 1.0),
        cache=CacheConfig("off", 64),
        local=LocalJudgeConfig("judges/a", "float32", 8192, 0.125),
        replay=ReplayConfig(pathlib.Path("old.jsonl"), "endpoint"),
        remote=RemoteConfig(("http://e:5",), "C_TOKEN", 8, 0.25),
        max_failure_share=0.25,
        failure_window=3,
        min_valid=3,
        alarms=AlarmConfig(7, 0.5, 0.25, 0.75, 0.125, 0.375, 0.875),
        audit=AuditConfig(
            every=5,
            share=0.125,
            kind="endpoint",
            endpoint=EndpointConfig(("http://c:3/v1",), "n", "B_KEY", "json_object", '{"top_k": 2}', 0.25, 1.0),
            local=LocalJudgeConfig("judges/b", "bfloat16", 4096, 0.25),
            sampling=JudgeSamplingConfig(None, 256, "max_completion_tokens", 6, 2),
            traffic=TrafficConfig(9, 61, 90_001, 21.0, 101.0, 4, 0.3, 6, 0.75, 11.0, 5, 3.0),
            replay=ReplayConfig(pathlib.Path("older.jsonl"), "rules"),
            remote=RemoteConfig(("http://d:4",), "A_TOKEN", 16, 0.5),
        ),
    ),
    sft=SftConfig(0.5, 6, 3, None, 4, OTHER_OPTIMIZER),
    grpo=GrpoConfig(
        steps=11,
        epochs=1.5,
        prompts=12,
        group=6,
        minibatches=2,
        passes=3,
        lag=1,
        old_logprobs="sampler",
        micro_batches=3,
        sampler=SamplerConfig(0.75, 50, 0.875, 0.0625, 33, 24, "int8", "int8"),
        advantage=AdvantageConfig("rloo", 1e-6, 0.01),
        loss=LossConfig(
            name="luspo",
            importance="sequence_token",
            aggregation="token_mean",
            clip_low=0.1,
            clip_high=0.3,
            delta=4.0,
            dual_clip=3.0,
            sapo_temperatures=(0.5, 2.0),
            vespo_positive=(1.0, 4.0),
            vespo_negative=(4.0, 1.0),
            beta=0.5,
            kl="k3+",
            kl_clamp="verl",
            kl_order="kl_then_weight",
            correction="sequence_mis",
            correction_cap=2.0,
            correction_floor=0.5,
            off_policy_threshold=0.25,
            top_entropy=0.2,
            mask_truncated=True,
            overlong_buffer=8,
            empty_rows="skip",
        ),
        optimizer=OTHER_OPTIMIZER,
    ),
    eval=EvalConfig(SamplerConfig(0.25, 5, 0.5, 0.25, 44, 7, "bfloat16", "int8"), 3, 2, "last"),
)
# A switch that needs a model without adapter, a switch that belongs to one preset, an adapter's
# directory, which names its own rank, and what stands instead of equal micro-batches.
MUON = ("sft.optimizer.muon_learning_rate", "grpo.optimizer.muon_learning_rate")
TOKENS = ("sft.tokens_per_micro_batch", "grpo.tokens_per_micro_batch")
FIXED = {"grpo.offload_reference", "grpo.loss.cispo_clip", "model.adapter", *MUON, *TOKENS}


def test_the_other_tree_differs_from_the_default_everywhere():
    default, other = flat(Config()), flat(OTHER)
    assert {name for name in default if default[name] == other[name]} == FIXED


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        OTHER,
        with_field(with_field(Config(), "grpo.loss.name", "cispo"), "grpo.loss.cispo_clip", "band"),
        with_field(with_field(Config(), MUON[0], 0.04), MUON[1], 0.02),
        with_field(Config(), "grpo.offload_reference", True),
        with_field(with_field(Config(), TOKENS[0], 4096), TOKENS[1], 2048),
    ],
)
def test_json_and_back_is_the_same_config(config):
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)
    assert {name: type(value) for name, value in flat(again).items()} == {
        name: type(value) for name, value in flat(config).items()
    }


@pytest.mark.parametrize("field", MUON)
def test_muon_has_no_matrices_in_an_adapter(field):
    adapting = with_field(Config(), "model.lora.rank", 4)
    with pytest.raises(ConfigError, match=f"^{field}: wanted none with an adapter, got 0.04"):
        with_field(adapting, field, 0.04)


def test_a_saved_config_with_a_field_of_another_version_is_refused():
    saved = json.loads(to_json(Config()))
    saved["grpo"]["loss"]["gamma"] = 0.5
    with pytest.raises(ConfigError, match=r"^grpo\.loss\.gamma: wanted one of name, importance.*got 0\.5"):
        from_json(json.dumps(saved))


def test_a_saved_config_may_lack_fields_that_came_later():
    saved = json.loads(to_json(OTHER))
    del saved["grpo"]["passes"]
    assert from_json(json.dumps(saved)).grpo.passes == GrpoConfig().passes


def test_flat_names_every_field_once_in_order():
    names = list(flat(Config()))
    assert names[:2] == ["run.dir", "run.seed"]
    assert names == list(leaf_types(Config))


# ---- every shipped config builds, and its programs have consistent shapes


def shipped(path: pathlib.Path) -> Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def spec_of(source: str) -> ModelSpec:
    """A built-in shape, or the one whose name is in that of the checkpoint's directory."""
    name = pathlib.Path(source).name.lower()
    return next(spec for shape, spec in SHAPES.items() if shape in name)


def abstract(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_sampling(config: Config, spec: ModelSpec, params: Any) -> Drawn:
    """All prompts of a step seated and decoded; the state keeps its shapes."""
    sampler, rows = config.grpo.sampler, (config.grpo.prompts, config.grpo.group)
    storage = Storage(sampler.kv_dtype, sampler.weights_dtype)
    device = make_generate(spec, compute_for(config.model), storage, sampler.rows).args[0]
    keys, number = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), abstract(())
    size, lengths = length_buckets(config.data.max_prompt_tokens), abstract(rows[:1])
    room = {"prompts": rows[0], "size": size, "columns": 64, "budget": sampler.max_new_tokens}
    empty = functools.partial(device.empty, **room)
    state, weights = jax.eval_shape(empty, keys, number), jax.eval_shape(device.weights, params)
    prompt = abstract((rows[0], size))
    seated = jax.eval_shape(device.admit, params, state, prompt, lengths, keys, lengths, number)
    controls = Controls.from_config(sampler)
    after = jax.eval_shape(device.decode, weights, seated, controls, abstract((3,)), number, number, number)
    assert same_shapes(after, state)
    return after.drawn


def abstract_batch(config: Config, prompts: int, group: int, tokens: int) -> GroupBatch:
    """A batch with everything that the loss of this config reads."""
    grpo, rows = config.grpo, (prompts, group)
    logprobs, several = abstract((*rows, tokens), jnp.float32), grpo.minibatches * grpo.passes > 1
    return GroupBatch(
        prompt_tokens=abstract((prompts, length_buckets(config.data.max_prompt_tokens))),
        prompt_lengths=abstract(rows),
        completion_tokens=abstract((*rows, tokens)),
        completion_lengths=abstract(rows),
        advantages=abstract(rows, jnp.float32),
        loss_rows=abstract(rows, bool),
        old_logprobs=logprobs if several else None,
        ref_logprobs=logprobs if grpo.loss.beta > 0 else None,
        sampler_logprobs=logprobs,
        entropy_floor=abstract((), jnp.float32) if grpo.loss.top_entropy < 1 else None,
    )


def same_shapes(after, before) -> bool:
    return jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)


def test_there_are_shipped_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_samples_updates_and_warm_starts_in_the_abstract(path):
    config = shipped(path)
    grpo, tokens = config.grpo, config.grpo.sampler.max_new_tokens
    spec, compute = spec_of(config.model.source), compute_for(config.model)
    params = jax.eval_shape(functools.partial(init, spec), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == spec.parameter_count
    drawn = abstract_sampling(config, spec, params)
    assert drawn.tokens.shape == drawn.sampler_logprobs.shape == (grpo.prompts, grpo.group, tokens)

    objective = grpo_objective(make_loss(grpo.loss, tokens))
    optimizer = make_optimizer(grpo.optimizer, 10)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    update = make_compiled_update(spec, compute, objective, optimizer, grpo.sampler.temperature, grpo.micro_batches)
    batch = abstract_batch(config, grpo.prompts // grpo.minibatches, grpo.group, tokens)
    after, metrics = jax.eval_shape(update, state, batch)
    assert same_shapes(after, state)
    assert metrics["loss"].sum.shape == ()

    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    update = make_compiled_update(spec, compute, sft_objective, optimizer, 1.0, config.sft.micro_batches)
    after, _ = jax.eval_shape(update, state, abstract_batch(config, config.sft.batch, 2, 96))
    assert same_shapes(after, state)
