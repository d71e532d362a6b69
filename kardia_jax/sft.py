"""Supervised warm start: the GRPO update with another objective.

In: a config and a policy. Out: the policy trained on every assistant turn of the training dialogues, each with its
history. The answers of one conversation are a group: they share the conversation, which is run once, and each continues
it from its own turn. Batches are padded to few sizes, so a handful of shapes is compiled.
"""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from kardia_jax.config import Config
from kardia_jax.dialogue.dataset import load_dialogues
from kardia_jax.dialogue.pipeline import batches
from kardia_jax.dialogue.prompt import Example, examples_of, load_system_prompt
from kardia_jax.grpo.optimizer import learning_rate, make_optimizer
from kardia_jax.grpo.update import sft_objective
from kardia_jax.model.sharding import check_rows, make_mesh
from kardia_jax.model.shares import rows_of, share_of
from kardia_jax.observe.measures import to_host, values
from kardia_jax.policies import Policy, check_positions, placed_policy
from kardia_jax.programs import compute_for, make_compiled_update
from kardia_jax.rollout.engine import SHORTEST, pad_rows
from kardia_jax.run import check_progress, open_run, report_data, start_state
from kardia_jax.types import GroupBatch
from kardia_jax.warmup import memory_errors, warm_update


def train_sft(config: Config, policy: Policy) -> Policy:
    """Minimises the token-mean negative log-likelihood of the answers; returns the trained policy."""
    mesh = make_mesh(config.mesh)
    check_rows(config.sft.batch, "sft.batch", mesh, config.sft.micro_batches)
    held = rows_of(share_of(mesh), config.sft.batch)
    policy = placed_policy(policy, mesh)
    # ---- Data
    loaded = load_dialogues(config.data, "train")
    examples = examples_of(
        loaded.dialogues, policy.tokenizer, config.data, load_system_prompt(config.data.system_prompt)
    )
    longest = max(len(example.completion_tokens) for example in examples.examples)
    check_positions(policy.spec, max(len(e.prompt.tokens) for e in examples.examples), longest, "sft")
    groups = conversations(examples.examples)
    order = batches(
        groups, config.sft.batch, config.run.seed, length=conversation_size, window=config.sft.length_window
    )
    steps = order.steps_for(config.sft.epochs)

    # ---- Program and state
    optimizer = make_optimizer(config.sft.optimizer, steps)
    rate = learning_rate(config.sft.optimizer, steps)
    compute = compute_for(config.model, mesh)
    update = make_compiled_update(
        policy.spec,
        compute,
        sft_objective,
        optimizer,
        temperature=1.0,
        micro_batches=config.sft.micro_batches,
        lora=policy.lora,
        seed=config.run.seed,
        tokens_per_micro_batch=config.sft.tokens_per_micro_batch,
    )

    fresh = start_state(policy.params, optimizer, config.sft.optimizer, "sft.optimizer", mesh)

    # ---- Loop
    with open_run(config, "sft", steps, fresh) as run, memory_errors("sft"):
        state = run.state
        used = f"{len(examples.examples)} answers in {len(groups)} conversations"
        report_data(run.console, loaded, examples.problems, used)
        with run.timer.phase("warm-up"):
            largest = largest_batch(groups, len(held.own), policy.pad_id, longest)
            warm_update(update, state, largest, policy.frozen, "sft")
        for step in range(run.first_step, steps):
            with run.timer.phase("batch"):
                batch = sft_batch(order[step], policy.pad_id, longest, held.own)
            with run.timer.phase("update"):
                state, means = update(state, batch, policy.frozen)
                metrics = values(to_host(means))
            check_progress(state, config.sft.optimizer.max_bad_steps, "sft.optimizer")
            tokens = float(batch.prompt_lengths.max(1).sum() + batch.completion_lengths.sum())
            tokens = float(held.share.everybodys(tokens).sum())
            metrics |= {"learning_rate": float(np.asarray(rate(step))), "tokens": tokens}
            run.finish_step(step + 1, state, metrics | {"epoch": float(order.epoch_of(step))})
    return policy._replace(params=state.params)


def conversations(examples: Sequence[Example]) -> list[list[Example]]:
    """Neighbouring examples whose prompts continue each other: the answers of one conversation, which is run once.

    With prompts ``a``, ``a b`` and ``c`` these are [[a, a b], [c]]. A template that rewrites earlier turns gives groups
    of one, which is as right and only slower.
    """
    groups: list[list[Example]] = []
    for example in examples:
        before = groups[-1][-1].prompt if groups else None
        prompt = example.prompt
        joins = before is not None and before.dialogue is prompt.dialogue
        if before is not None and joins and prompt.tokens[: len(before.tokens)] == before.tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def conversation_size(group: Sequence[Example]) -> tuple[int, int]:
    """What decides the padded shape of a conversation: answers, then tokens of the whole prompt."""
    return len(group), len(group[-1].prompt.tokens)


def largest_batch(groups: Sequence[Sequence[Example]], batch: int, pad_id: int, answer_tokens: int) -> GroupBatch:
    """A batch of the shape that none of a run exceeds: the most answers and the longest prompt in every row."""
    most, longest = max(groups, key=len), max((group[-1].prompt for group in groups), key=lambda p: len(p.tokens))
    full = [*most[:-1], Example(longest, most[-1].completion_tokens)]
    return sft_batch([full] * batch, pad_id, answer_tokens)


def sft_batch(
    groups: Sequence[Sequence[Example]], pad_id: int, answer_tokens: int = SHORTEST, own: Iterable[int] | None = None
) -> GroupBatch:
    """Conversations with their answers, right-padded to the one with the most; rows without an answer are left out of
    the loss. Answers are padded to the bucket of ``answer_tokens`` at least: the longest of a run, so that a batch of
    short ones is no shape of its own to compile. With ``own`` these conversations alone, in the shape of all."""
    size, room = max(map(len, groups)), max(len(group[-1].prompt.tokens) for group in groups)
    groups = groups if own is None else [groups[place] for place in own]
    prompt_tokens, _ = pad_rows([group[-1].prompt.tokens for group in groups], pad_id, max(SHORTEST, room))
    rows = [[*group, *[None] * (size - len(group))] for group in groups]
    flat = [example for row in rows for example in row]
    answers = [() if example is None else example.completion_tokens for example in flat]
    tokens, lengths = pad_rows(answers, pad_id, answer_tokens)
    starts = [1 if example is None else len(example.prompt.tokens) for example in flat]
    shape = (len(groups), size)
    return GroupBatch(
        prompt_tokens=jnp.asarray(prompt_tokens),
        prompt_lengths=jnp.array(starts).reshape(shape),
        completion_tokens=jnp.asarray(tokens.reshape(*shape, -1)),
        completion_lengths=jnp.asarray(lengths.reshape(shape)),
        advantages=jnp.ones(shape),
        loss_rows=jnp.array([example is not None for example in flat]).reshape(shape),
    )
