import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import run as run_module
from kardia_jax import sft
from kardia_jax.checkpoint import CheckpointError, latest_step, restore_latest
from kardia_jax.config import DataConfig, to_json
from kardia_jax.dialogue.dataset import load_dialogues
from kardia_jax.dialogue.prompt import Example, Prompt, examples_of, load_system_prompt
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import init_state, sft_objective
from kardia_jax.model.policy import Compute
from kardia_jax.programs import score
from kardia_jax.run import TrainingError
from kardia_jax.sft import conversations, sft_batch, train_sft

# Shared and repeated prompts sum in another order.
SHARING = 1e-5
Usage = namedtuple("Usage", "total used free")


def example(prompt: tuple[int, ...], completion: tuple[int, ...], dialogue) -> Example:
    return Example(Prompt(prompt, "", dialogue, 0, ()), completion)


@pytest.fixture
def dialogues(world):
    return load_dialogues(DataConfig(source=str(world)), "train").dialogues


def lengths(groups) -> list[list[int]]:
    return [[len(example.prompt.tokens) for example in group] for group in groups]


def test_answers_whose_prompts_continue_each_other_are_one_group(dialogues):
    first, second = dialogues[:2]
    chat = [example((1, 2), (9,), first), example((1, 2, 9, 3), (8,), first), example((1, 2), (7,), second)]
    assert lengths(conversations(chat)) == [[2, 4], [2]]


def test_a_template_that_rewrites_history_gives_groups_of_one(dialogues):
    first = dialogues[0]
    chat = [example((1, 2), (9,), first), example((1, 5, 9, 3), (8,), first), example((1, 5, 9, 3, 4), (7,), first)]
    assert lengths(conversations(chat)) == [[2], [4, 5]]


def test_equal_beginnings_of_two_dialogues_are_not_one_conversation(dialogues):
    first, second = dialogues[:2]
    assert lengths(conversations([example((1,), (9,), first), example((1, 2), (9,), second)])) == [[1], [2]]


def test_the_mini_template_keeps_the_prefix_law(dialogues, config_of, nano_policy):
    config = config_of().data
    chat = examples_of(dialogues, nano_policy.tokenizer, config, load_system_prompt(config.system_prompt)).examples
    groups = conversations(chat)
    assert [len(group) for group in groups] == [1, 2, 1, 2, 1, 2]
    assert [one for group in groups for one in group] == list(chat)
    for group in groups:
        for example in group:
            assert group[-1].prompt.tokens[: len(example.prompt.tokens)] == example.prompt.tokens


def test_a_batch_by_hand(dialogues):
    first, second = dialogues[:2]
    groups = [[example((1, 2), (9,), first), example((1, 2, 9, 3), (8, 7), first)], [example((4,), (6, 6, 6), second)]]
    batch = sft_batch(groups, pad_id=0)
    assert batch.prompt_tokens.shape == (2, 16)
    assert batch.prompt_tokens[:, :5].tolist() == [[1, 2, 9, 3, 0], [4, 0, 0, 0, 0]]
    assert batch.prompt_lengths.tolist() == [[2, 4], [1, 1]]
    assert batch.completion_tokens[..., :4].tolist() == [[[9, 0, 0, 0], [8, 7, 0, 0]], [[6, 6, 6, 0], [0, 0, 0, 0]]]
    assert batch.completion_lengths.tolist() == [[1, 2], [3, 0]]
    assert batch.loss_rows.tolist() == [[True, True], [True, False]]
    assert (batch.old_logprobs, batch.ref_logprobs) == (None, None)


def test_a_shared_prompt_costs_and_teaches_what_separate_ones_do(dialogues, config_of, nano_policy):
    config = config_of().data
    chat = examples_of(dialogues, nano_policy.tokenizer, config, load_system_prompt(config.system_prompt)).examples

    @jax.jit
    def loss_and_gradient(params, batch):
        def loss(params):
            logprobs, entropy = score(nano_policy.spec, Compute(remat="none"), params, batch, jnp.float32(1.0))
            total, _ = sft_objective(batch, logprobs, entropy)
            return total.sum / total.weight

        return jax.value_and_grad(loss)(params)

    groups = conversations(chat)[:4]
    shared = sft_batch([*groups, *groups[:2]], nano_policy.pad_id)
    # Two groups are there twice, so that both batches have one shape; the copies leave the loss.
    shared = shared._replace(loss_rows=shared.loss_rows.at[4:].set(False))
    alone = sft_batch([[one] for group in groups for one in group], nano_policy.pad_id)
    assert shared.loss_rows.sum() == alone.loss_rows.sum() == 6
    shared, alone = loss_and_gradient(nano_policy.params, shared), loss_and_gradient(nano_policy.params, alone)
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=SHARING)
    # An untrained model guesses among all tokens; and there is a gradient to compare.
    assert float(shared[0]) == pytest.approx(np.log(nano_policy.spec.sampled_tokens), abs=0.5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(shared[1])) > 1e-3


# ---- the loop


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def final_state(config, params):
    optimizer = make_optimizer(config.sft.optimizer, 1)
    restored = restore_latest(config.run.dir / "checkpoints", jax.eval_shape(lambda: init_state(params, optimizer)))
    assert restored is not None
    return restored.state


def without_clocks(rows):
    """Less what a resumed process does anew: the time it takes and what it compiles."""
    anew = ("tokens_per_second", "compilations")
    return [{k: v for k, v in one.items() if not k.startswith("seconds/") and k not in anew} for one in rows]


@pytest.fixture(scope="module")
def whole(config_in, fresh_policy, read_lines, tmp_path_factory):
    """The state and metrics of a run that nobody stopped."""
    config = config_in(tmp_path_factory.mktemp("whole"))
    policy = train_sft(config, fresh_policy())
    state = final_state(config, policy.params)
    assert bits(state.params) == bits(policy.params)
    return {"state": bits(state), "metrics": without_clocks(read_lines(config.run.dir / "metrics.jsonl"))}


def test_two_epochs_lower_the_loss(whole):
    metrics = whole["metrics"]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[3]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[0]["learning_rate"] == pytest.approx(1e-2)
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in metrics)


def test_tokens_count_each_prompt_once(whole):
    # An epoch is 3 prompts of 68 tokens, 3 of 93 that hold two answers, and 9 answers of 25.
    assert sum(row["tokens"] for row in whole["metrics"]) == 2 * (3 * 68 + 3 * 93 + 9 * 25)


BOUNDARIES = {
    # The first batch that is made is the largest, for the warm-up.
    "before the batch": (sft, "sft_batch", 4),
    "after the update": (sft, "check_progress", 3),
    "before the metrics are written": (run_module.JsonlWriter, "write", 8),
    "on the terminal, with a checkpoint due": (run_module.TrainingConsole, "update", 4),
    "before the checkpoint": (run_module.Checkpoints, "save", 2),
}


def resumed(config_of, fresh_policy, read_lines):
    config = config_of({"run.resume": True})
    policy = train_sft(config, fresh_policy())
    metrics = without_clocks(read_lines(config.run.dir / "metrics.jsonl"))
    return {"state": bits(final_state(config, policy.params)), "metrics": metrics}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(boundary, whole, config_of, fresh_policy, killed_at, read_lines):
    with killed_at(*BOUNDARIES[boundary]) as killed, pytest.raises(killed):
        train_sft(config_of(), fresh_policy())
    assert resumed(config_of, fresh_policy, read_lines) == whole


PLACES = {
    "sft.optimizer.moment_dtype": "bfloat16",
    "sft.optimizer.offload": True,
}


@pytest.mark.parametrize("field", PLACES)
def test_moments_of_another_type_or_place_are_resumed_bit_for_bit(
    field, whole, config_of, config_in, fresh_policy, killed_at, read_lines, tmp_path
):
    fields = {field: PLACES[field]}
    train_sft(config_in(tmp_path / "straight", fields), fresh_policy())
    straight = bits(final_state(config_in(tmp_path / "straight", fields), fresh_policy().params))
    with killed_at(sft, "check_progress", 3) as killed, pytest.raises(killed):
        train_sft(config_of(fields), fresh_policy())
    config = config_of(fields | {"run.resume": True})
    policy = train_sft(config, fresh_policy())
    assert bits(final_state(config, policy.params)) == straight
    # Where the moments live changes nothing; their type does.
    assert (straight == whole["state"]) == (field == "sft.optimizer.offload")


def test_micro_batches_by_tokens_learn_the_same(whole, config_of, fresh_policy, read_lines):
    config = config_of({"sft.tokens_per_micro_batch": 200})
    train_sft(config, fresh_policy())
    for ours, theirs in zip(read_lines(config.run.dir / "metrics.jsonl"), whole["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]


def test_a_checkpoint_that_was_cut_off_is_passed_over(whole, config_of, fresh_policy, killed_at, read_lines, capsys):
    with killed_at(sft, "check_progress", 4) as killed, pytest.raises(killed):
        train_sft(config_of(), fresh_policy())
    checkpoints = config_of().run.dir / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "4.orbax-checkpoint-tmp")
    assert resumed(config_of, fresh_policy, read_lines) == whole
    assert "4.orbax-checkpoint-tmp" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4"]


KILLED = """
import dataclasses, os, pathlib, signal, sys, time
from kardia_jax import sft
from kardia_jax.checkpoint import latest_step
from kardia_jax.config import from_json
from kardia_jax.model.shapes import SHAPES, TINY
from kardia_jax.policies import load_policy
shape = {"width": 16, "mlp_width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8}
SHAPES["nano"] = dataclasses.replace(TINY, family="qwen3", **shape)
config = from_json(pathlib.Path(sys.argv[1]).read_text("utf-8"))
steps = []
def check_progress(*args):
    steps.append(args)
    if len(steps) == 3:
        # In the middle of step 3, as soon as the checkpoint of step 2 is there.
        while latest_step(config.run.dir / "checkpoints") is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
sft.check_progress = check_progress
sft.train_sft(config, load_policy(config.model, config.run.seed))
"""


def test_a_process_that_is_killed_goes_on_bit_for_bit(whole, config_of, fresh_policy, read_lines, tmp_path):
    (tmp_path / "config.json").write_text(to_json(config_of()), "utf-8")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json")]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(read_lines(config_of().run.dir / "metrics.jsonl")) == 2
    assert resumed(config_of, fresh_policy, read_lines) == whole


def test_a_full_disk_stops_the_run_and_spares_the_older_checkpoint(
    whole, config_of, fresh_policy, read_lines, monkeypatch
):
    free = iter([10**12, 100, 100, 100])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, next(free)))
        with pytest.raises(CheckpointError, match=r"no room for a checkpoint.*got 100\. Older.*untouched.*and resume"):
            train_sft(config_of(), fresh_policy())
    checkpoints = config_of().run.dir / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["2"]
    assert resumed(config_of, fresh_policy, read_lines) == whole


def test_gradients_that_stay_bad_stop_the_run_before_anything_is_saved(config_of, fresh_policy):
    policy = fresh_policy()
    policy.params["final_norm"]["scale"] = policy.params["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(TrainingError, match=r"sft\.optimizer\.max_bad_steps: 2 updates in a row.*Export"):
        train_sft(config_of(), policy)
    assert latest_step(config_of().run.dir / "checkpoints") is None
