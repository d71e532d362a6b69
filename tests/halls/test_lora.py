"""Adapters in the loops: the base is the reference and stays, a resumed run repeats itself, exports agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import scoring, sft, train
from kardia_jax.checkpoint import restore_latest
from kardia_jax.config import FULL, ConfigError, LoraConfig, ModelConfig
from kardia_jax.evaluate import evaluate
from kardia_jax.export import export_adapter, export_final, export_run
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import init_state
from kardia_jax.hf.tables import HfError
from kardia_jax.model.lora import merged_model
from kardia_jax.model.policy import Compute, logits
from kardia_jax.policies import adapted, load_policy, with_new_adapter
from kardia_jax.sft import train_sft
from kardia_jax.train import train_grpo

LORA = LoraConfig(rank=2, alpha=8, targets=("q_proj", "o_proj", "up_proj"), dropout=0.25)
# float32; the same products in another order, logits of size 1.
TOLERANCE = 1e-5


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def without_clocks(rows):
    """Less what a resumed process does anew: the time that it and its judge take, and what it compiles."""
    anew, clocks = ("tokens_per_second", "compilations"), ("seconds/", "judge/")
    return [{k: v for k, v in one.items() if not k.startswith(clocks) and k not in anew} for one in rows]


def files(config, read_lines):
    rollouts = config.run.dir / "rollouts.jsonl"
    return without_clocks(read_lines(config.run.dir / "metrics.jsonl")), rollouts.read_bytes()


def state_of(config, policy):
    """The newest checkpoint of a run."""
    optimizer = make_optimizer(config.grpo.optimizer, 1)
    like = jax.eval_shape(lambda: init_state(policy.params, optimizer))
    restored = restore_latest(config.run.dir / "checkpoints", like)
    assert restored is not None
    return restored.state


def some_logits(spec, params) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 3000, (2, 9)))
    return np.asarray(logits(spec, Compute(remat="none"), params, tokens, jnp.full(2, 9)))


@pytest.fixture(scope="module")
def lora_config(config_in):
    """The tiny config in a folder, with an adapter."""
    return lambda folder, fields=None: config_in(folder, {"model.lora": LORA, "grpo.loss.beta": 0.1, **(fields or {})})


@pytest.fixture(scope="module")
def start(fresh_policy):
    """Makes the start policy with a fresh adapter."""
    return lambda lora=LORA: with_new_adapter(fresh_policy(), lora, 0)


@pytest.fixture(scope="module")
def whole(lora_config, start, grader_of, lenient_parse, tmp_path_factory):
    """The config, start and end of a GRPO run with an adapter, and the references that were scored."""
    config, policy, references = lora_config(tmp_path_factory.mktemp("whole") / "run"), start(), []
    original = train.with_logprobs

    def keep(batch, score, params, reference, grpo):
        references.append(reference)
        return original(batch, score, params, reference, grpo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "parse", lenient_parse)
        patch.setattr(train, "with_logprobs", keep)
        trained = train_grpo(config, policy, grader_of())
    return config, policy, trained, references


def test_the_base_is_the_reference_itself_and_stays_as_it_was(whole, nano_policy, read_lines):
    config, policy, trained, references = whole
    assert all(reference is policy.frozen for reference in references)
    assert bits(trained.frozen) == bits(nano_policy.params)
    metrics = read_lines(config.run.dir / "metrics.jsonl")
    # B starts as zero, so the first batch is scored by the base on both sides; dropout of 0 B A x is 0 too.
    # Only rounding is left: the two are different programs.
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-12)
    assert metrics[3]["kl"] > 0
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in metrics)


def test_the_checkpoint_holds_the_adapter_and_nothing_of_the_base(whole):
    config, _, trained, _ = whole
    state = state_of(config, trained)
    assert bits(state.params) == bits(trained.params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(trained.params)}
    assert len(jax.tree.leaves(trained.params)) == 2 * 3
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == shapes


BOUNDARIES = {
    "while scoring": (train, "with_logprobs", 4),
    "after the update": (train, "check_progress", 3),
}


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_killed_on_the_way_goes_on_bit_for_bit(
    boundary, whole, lora_config, start, grader_of, killed_at, read_lines, tmp_path
):
    with killed_at(*BOUNDARIES[boundary]) as killed, pytest.raises(killed):
        train_grpo(lora_config(tmp_path / "run"), start(), grader_of())
    config = lora_config(tmp_path / "run", {"run.resume": True})
    policy = train_grpo(config, start(), grader_of())
    assert bits(policy.params) == bits(whole[2].params)
    assert bits(state_of(config, policy)) == bits(state_of(whole[0], whole[2]))
    assert files(config, read_lines) == files(whole[0], read_lines)


@pytest.mark.usefixtures("every_text_counts")
def test_another_adapter_is_another_run(whole, lora_config, start, grader_of, killed_at, tmp_path):
    with killed_at(train, "check_progress", 3) as killed, pytest.raises(killed):
        train_grpo(lora_config(tmp_path / "run"), start(), grader_of())
    changed = {"run.resume": True, "model.lora": dataclasses.replace(LORA, alpha=4)}
    with pytest.raises(ConfigError, match=r"model\.lora\.alpha: wanted 8 as in the checkpoint, got 4"):
        train_grpo(lora_config(tmp_path / "run", changed), start(), grader_of())


def test_the_warm_start_resumes_bit_for_bit_too(lora_config, start, killed_at, tmp_path):
    one = train_sft(lora_config(tmp_path / "one"), start())
    with killed_at(sft, "check_progress", 4) as killed, pytest.raises(killed):
        train_sft(lora_config(tmp_path / "two"), start())
    two = train_sft(lora_config(tmp_path / "two", {"run.resume": True}), start())
    assert bits(one.params) == bits(two.params)
    assert bits(one.params) != bits(start().params)


# ---- out and in again


def test_a_finished_run_leaves_the_merged_model_and_the_adapter(whole, nano_policy):
    config, _, trained, _ = whole
    export_final(config, trained, "grpo")
    merged = load_policy(ModelConfig(source=str(config.run.dir / "hf")), seed=5)
    assert merged.lora == FULL
    wanted = some_logits(trained.spec, trained.full())
    np.testing.assert_allclose(some_logits(trained.spec, merged.params), wanted, atol=TOLERANCE)
    assert np.abs(some_logits(trained.spec, nano_policy.params) - wanted).max() > 100 * TOLERANCE
    again = load_policy(ModelConfig(source="nano", adapter=config.run.dir / "adapter"), seed=0)
    assert bits(again.params) == bits(trained.params)
    assert bits(again.frozen) == bits(trained.frozen)
    assert (again.lora.names, again.lora.scale, again.lora.dropout) == (LORA.names, LORA.scale, LORA.dropout)
    assert "over `nano`" in (config.run.dir / "adapter" / "README.md").read_text("utf-8")


def test_an_interrupted_run_is_exported_both_ways(lora_config, start, killed_at, tmp_path):
    config = lora_config(tmp_path / "run")
    with killed_at(sft, "check_progress", 4) as killed, pytest.raises(killed):
        train_sft(config, start())
    export_run(config.run.dir, tmp_path / "hf", "float32", overwrite=False, adapter=tmp_path / "adapter")
    with pytest.raises(HfError, match=r"adapter: wanted an empty or new folder, got one in use"):
        export_run(config.run.dir, tmp_path / "other", "float32", overwrite=False, adapter=tmp_path / "adapter")
    with pytest.raises(HfError, match="wanted a folder apart"):
        export_run(config.run.dir, tmp_path / "other", "float32", overwrite=False, adapter=tmp_path / "other" / "a")
    assert not (tmp_path / "other").exists()
    merged = load_policy(ModelConfig(source=str(tmp_path / "hf")), seed=0)
    again = load_policy(ModelConfig(source="nano", adapter=tmp_path / "adapter"), seed=0)
    np.testing.assert_allclose(
        some_logits(merged.spec, merged.params), some_logits(again.spec, again.full()), atol=TOLERANCE
    )


def test_a_policy_that_was_trained_whole_has_no_adapter_to_export(config_of, nano_policy, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter: wanted a run with model\.lora\.rank above 0"):
        export_adapter(config_of(), nano_policy, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapter_and_merged_model_answer_alike(whole, grader_of):
    config, _, trained, _ = whole
    plain = trained._replace(params=merged_model(trained.full()), frozen={}, lora=FULL)
    adapter, merged = (evaluate(config, policy, grader_of()) for policy in (trained, plain))
    assert [row["completion"] for row in adapter.rows] == [row["completion"] for row in merged.rows]


# ---- starting


def test_a_new_adapter_changes_nothing_and_follows_from_the_seed(nano_policy):
    policy = load_policy(ModelConfig(source="nano", lora=LORA), seed=0)
    np.testing.assert_array_equal(some_logits(policy.spec, policy.full()), some_logits(policy.spec, nano_policy.params))
    assert bits(policy.params) == bits(load_policy(ModelConfig(source="nano", lora=LORA), seed=0).params)
    assert bits(policy.params) != bits(load_policy(ModelConfig(source="nano", lora=LORA), seed=1).params)


def test_the_base_may_be_kept_in_half_the_size(lora_config, tmp_path):
    lora = dataclasses.replace(LORA, base="bfloat16")
    policy = load_policy(ModelConfig(source="nano", lora=lora), seed=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(policy.frozen)} == {jnp.dtype(jnp.bfloat16)}
    trained = train_sft(lora_config(tmp_path / "run", {"model.lora": lora, "sft.epochs": 0.5}), policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype(jnp.float32)}
    assert bits(trained.frozen) == bits(policy.frozen)
    export_final(lora_config(tmp_path / "run"), trained, "sft")
    merged = load_policy(ModelConfig(source=str(tmp_path / "run" / "hf")), seed=0)
    wanted = some_logits(trained.spec, trained.full())
    np.testing.assert_allclose(some_logits(merged.spec, merged.params), wanted, atol=TOLERANCE)
    # From a directory too, where weights are read in this type.
    again = load_policy(ModelConfig(source=str(tmp_path / "run" / "hf"), lora=lora), seed=0)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged.params)
    assert bits(again.frozen) == bits(rounded)


def test_a_second_adapter_starts_where_the_first_ended(whole):
    trained = whole[2]
    second = with_new_adapter(trained, LORA, seed=3)
    wanted = some_logits(trained.spec, trained.full())
    np.testing.assert_allclose(some_logits(second.spec, second.frozen), wanted, atol=TOLERANCE)
    np.testing.assert_array_equal(some_logits(second.spec, second.full()), some_logits(second.spec, second.frozen))
    assert with_new_adapter(trained, FULL, seed=3) is trained


def test_tags_that_look_alike_are_named(nano_policy, capsys):
    adapter = load_policy(ModelConfig(source="nano", lora=LORA), seed=0).params
    adapted(nano_policy, LORA, adapter)
    assert capsys.readouterr().err == ""
    table = nano_policy.params["embed"]["embedding"]
    alike = nano_policy._replace(params=nano_policy.params | {"embed": {"embedding": jnp.ones_like(table)}})
    adapted(alike, LORA, adapter)
    assert "model.lora: the span tags are new to this model" in capsys.readouterr().err
