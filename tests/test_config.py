"""Every field of the tree: its choices, what follows from it, and the way to JSON and back."""

import dataclasses
import json
import pathlib
import re

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
    HostsConfig,
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
    run=RunConfig(pathlib.Path("runs/é x"), 7, True, 3, 4, -1, False, ("wandb", "mlflow"), "off", True),
    data=DataConfig("data/x.jsonl", "skip", pathlib.Path("p.txt"), "spans", 64, "skip", 10, 5),
    model=ModelConfig(
        *("out/hf", "out/tokenizer", "bfloat16", "xla", "dots", 16, 32, 3),
        lora=LoraConfig(8, 32.0, ("q_proj", "v_proj"), 0.25, "rslora", "bfloat16"),
    ),
    mesh=MeshConfig(2, 4, -1, SamplerMeshConfig(3, 2, 5)),
    hosts=HostsConfig("slurm", "10.0.0.2:8476", 4, 3, 20, 5),
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
