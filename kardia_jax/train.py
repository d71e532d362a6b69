"""GRPO against a rubric judge: sample groups, grade them, update.

In: a config, a policy to start from, a grader. Out: the trained policy. The policy that comes in stays as the reference
when ``beta`` is above 0; with an adapter, the base under it does. Every random choice is derived from (seed, step,
prompt, sample), so the loop holds no random state and a resumed run repeats an uninterrupted one bit for bit.

The judge is asked about a completion as soon as it ends, while the device decodes the others and then scores them. With
``grpo.lag`` 1 the next step is sampled before this one is learned from, so that the judge has a whole rollout's time:

    lag 0    sample 0 | judge 0 | learn 0 | sample 1 | judge 1 | learn 1 | ...
    lag 1    sample 0 | sample 1 | learn 0 | sample 2 | learn 1 | ...            judge i beside sample i + 1
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from kardia_jax.config import Config, GrpoConfig
from kardia_jax.dialogue.dataset import load_dialogues
from kardia_jax.dialogue.pipeline import batches
from kardia_jax.dialogue.prompt import load_system_prompt, prompts_of
from kardia_jax.dialogue.spans import Spans
from kardia_jax.grpo.advantages import group_advantages, group_diagnostics, soft_overlong_penalty
from kardia_jax.grpo.losses import entropy_floor, make_loss
from kardia_jax.grpo.optimizer import learning_rate, make_optimizer
from kardia_jax.grpo.update import completion_mask, grpo_objective
from kardia_jax.hands import Hand, taken_up
from kardia_jax.hosts import alone
from kardia_jax.judging import Grading, Judging
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.decoding import Storage
from kardia_jax.model.sharding import check_rows, make_mesh
from kardia_jax.model.shares import Rows, rows_of, share_of
from kardia_jax.observe.measures import merge, to_host, values
from kardia_jax.placement import beside, offloaded, own_rows
from kardia_jax.policies import Policy, check_positions, placed_policy, sampler_of
from kardia_jax.programs import (
    CompiledUpdate,
    Score,
    compute_for,
    make_compiled_update,
    make_generate,
    make_score,
    sampling_compute,
)
from kardia_jax.rewards.alarms import Alarms
from kardia_jax.rewards.diagnostics import hacking_signs
from kardia_jax.rollout.engine import Sampled, Sampler, sample
from kardia_jax.rollout.sampling import Controls
from kardia_jax.run import check_progress, open_run, report_data, start_state
from kardia_jax.scoring import Graded, Grader, reward_metrics, rollout_rows
from kardia_jax.types import GroupBatch, Params, Rollouts, TrainState
from kardia_jax.warmup import memory_errors, warm_grpo


def train_grpo(config: Config, policy: Policy, grader: Grader) -> Policy:
    """Runs the loop of the config; returns the trained policy."""
    grpo, seed = config.grpo, config.run.seed
    check_positions(policy.spec, config.data.max_prompt_tokens, grpo.sampler.max_new_tokens, "grpo.sampler")
    mesh = make_mesh(config.mesh)
    per_update = grpo.prompts // grpo.minibatches
    check_rows(per_update, "grpo.prompts / grpo.minibatches", mesh, grpo.micro_batches)
    share = share_of(mesh)
    held = rows_of(share, grpo.prompts, grpo.minibatches)
    policy = placed_policy(policy, mesh)

    # ---- Data
    loaded = load_dialogues(config.data, "train")
    system_prompt = load_system_prompt(config.data.system_prompt)
    prompts = prompts_of(loaded.dialogues, policy.tokenizer, config.data, system_prompt)
    order = batches(range(len(prompts.prompts)), grpo.prompts, seed)
    steps = grpo.steps if grpo.steps is not None else order.steps_for(grpo.epochs)

    # ---- Programs and state
    updates = steps * grpo.minibatches * grpo.passes
    optimizer, rate = make_optimizer(grpo.optimizer, updates), learning_rate(grpo.optimizer, updates)
    sampler, score, update = programs_of(config, policy, optimizer, mesh)
    controls = Controls.from_config(grpo.sampler)
    fresh = start_state(policy.params, optimizer, grpo.optimizer, "grpo.optimizer", mesh)
    reference = policy.reference() if grpo.loss.beta > 0 else None
    if reference is not None and grpo.offload_reference:
        reference = offloaded(reference, "grpo.offload_reference")

    # ---- Loop
    with (
        open_run(config, "grpo", steps, fresh, held) as run,
        Judging(grader, config.judge, seed, share) as judging,
        memory_errors("grpo"),
    ):
        state, timer, alarms = run.state, run.timer, Alarms(config.judge.alarms)
        report_data(run.console, loaded, prompts.problems, f"{len(prompts.prompts)} prompts")
        # ---- The largest shapes first: what does not fit shows before the first step
        with timer.phase("warm-up"):
            longest = max((prompt.tokens for prompt in prompts.prompts), key=len)
            warm_grpo(config, policy, sampler, score, update, state, reference, longest, mesh)

        def begin(number: int, params: Params, kept: Mapping[str, Any] | None = None) -> Hand:
            """Samples step ``number``, or takes up what a checkpoint kept of it. A completion goes to the judge when it
            ends; then the device is given the log-probs to compute, and nobody waits for them here."""
            ids = order[number]
            asked = [prompts.prompts[i] for i in ids]
            grading = judging.begin(number, asked, grpo.group, held)
            with timer.phase("rollout"):
                if kept is None:
                    rows = [asked[place].tokens for place in held.own]
                    keys = row_keys(seed, Purpose.ROLLOUT, number, jnp.array(ids), grpo.group)[held.own]
                    most, room = grpo.sampler.max_new_tokens, max(len(prompt.tokens) for prompt in asked)
                    sampled, known = sample(sampler, params, rows, keys, controls, most, grading.finished, room), {}
                else:
                    sampled, known = taken_up(kept, sampler, asked, grading, held)
            batch = rollout_batch(sampled, grpo)._replace(**known)
            return Hand(asked, sampled, with_logprobs(batch, score, params, reference, grpo), grading)

        hands = deque(begin(run.first_step + n, policy.full(state.params), kept) for n, kept in enumerate(run.in_hand))
        for step in range(run.first_step, steps):
            # ---- Sample, `lag` steps ahead of the learner
            while len(hands) <= min(grpo.lag, steps - 1 - step):
                hands.append(begin(step + len(hands), policy.full(state.params)))
            hand = hands.popleft()
            asked, sampled, batch, grading = hand
            # ---- Grade; the device works on log-probs meanwhile
            run.end_if_asked(step, state, (hand, *hands))
            with timer.phase("judge"), run.saved_before_stop(step, state, (hand, *hands)):
                graded = grading.graded()
                judging.check(graded)
            with timer.phase("reference"):
                jax.block_until_ready(batch)
            # ---- Learn; in a run of several processes all know what was said, and each learns from its own rows
            known = outline(sampled, grading, held)
            advantages, signal = advantages_of(graded, known, config)
            enough = enough_verdicts(graded, config.judge.min_valid)
            batch = batch._replace(advantages=advantages[held.own], loss_rows=batch.loss_rows & enough[held.own])
            with timer.phase("update"):
                state, learned = learn(update, state, policy.frozen, minibatches(batch, grpo))
            check_progress(state, grpo.optimizer.max_bad_steps, "grpo.optimizer")
            # ---- Report
            judged = grading.metrics() | judging.metrics()
            if grading.has_audit:
                with timer.phase("audit"):
                    judged |= grading.audited()
            metrics = {
                **learned,
                **reward_metrics(graded),
                **signal,
                **rollout_metrics(known, graded),
                **judged,
                "epoch": float(order.epoch_of(step)),
                "learning_rate": float(np.asarray(rate(int(state.step) - 1))),
            }
            for sign in alarms.update(metrics):
                run.console.message(f"step {step + 1}: {sign}")
            shown = slice(None) if config.run.log_rollouts < 0 else slice(config.run.log_rollouts)
            rows = list(rollout_rows(asked[shown], known.texts_P_G[shown], graded))
            run.finish_step(step + 1, state, metrics, rows, hands)
    return policy._replace(params=state.params)


class Programs(NamedTuple):
    """What a step runs on the devices, one after the other."""

    sampler: Sampler
    score: Score
    update: CompiledUpdate


def programs_of(config: Config, policy: Policy, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> Programs:
    """The programs of this config, for this policy."""
    grpo, compute = config.grpo, compute_for(config.model, mesh)
    storage = Storage(grpo.sampler.kv_dtype, grpo.sampler.weights_dtype)
    sampling = sampling_compute(policy.spec, compute, config.mesh)
    update = make_compiled_update(
        policy.spec,
        compute,
        grpo_objective(make_loss(grpo.loss, grpo.sampler.max_new_tokens)),
        optimizer,
        grpo.sampler.temperature,
        grpo.micro_batches,
        policy.lora,
        config.run.seed,
        grpo.tokens_per_micro_batch,
    )
    generate = make_generate(policy.spec, sampling, storage, grpo.sampler.rows)
    return Programs(sampler_of(policy, generate), make_score(policy.spec, compute), update)


def outline(sampled: Sampled, grading: Grading, held: Rows) -> Sampled:
    """What every process has to know of a step: lengths, ends and texts of all completions, but no token of others."""
    if alone():
        return sampled
    rollouts = sampled.rollouts
    nothing = np.zeros((*grading.shape, 0))
    return Sampled(
        np.zeros((held.places.size, 0), np.int32),
        held.whole(sampled.prompt_lengths),
        Rollouts(nothing, held.whole(rollouts.lengths), nothing, nothing, held.whole(rollouts.stopped)),
        grading.texts_P_G,
    )


def rollout_batch(sampled: Sampled, grpo: GrpoConfig) -> GroupBatch:
    """What is known of a batch before it is graded."""
    rollouts = sampled.rollouts
    # Filtered sampling is corrected for by the weights if one is asked for; otherwise the learner's own distribution
    # is compared, so that the mismatch metric shows disagreement between programs alone.
    corrected = grpo.loss.correction != "none" or grpo.loss.off_policy_threshold is not None
    recorded = grpo.off_policy and grpo.old_logprobs == "sampler"
    return GroupBatch(
        prompt_tokens=jnp.asarray(sampled.prompt_tokens),
        prompt_lengths=jnp.broadcast_to(sampled.prompt_lengths[:, None], rollouts.lengths.shape),
        completion_tokens=jnp.asarray(rollouts.tokens),
        completion_lengths=jnp.asarray(rollouts.lengths),
        advantages=jnp.zeros(rollouts.lengths.shape),
        loss_rows=jnp.asarray(rollouts.stopped | (not grpo.loss.mask_truncated)),
        old_logprobs=jnp.asarray(rollouts.tempered_logprobs) if recorded else None,
        sampler_logprobs=jnp.asarray(rollouts.sampler_logprobs if corrected else rollouts.tempered_logprobs),
    )


def with_logprobs(
    batch: GroupBatch, score: Score, params: Params, reference: Params | None, grpo: GrpoConfig
) -> GroupBatch:
    """Adds old and reference log-probs and the entropy floor, each only where the loss will read it and it is not there
    yet; ``params`` are the weights that sampled.

    With one update per rollout, and no lag, the ratio is 1 by definition and old log-probs are not computed.
    """
    temperature = jnp.float32(grpo.sampler.temperature)
    if reference is not None:
        batch = batch._replace(ref_logprobs=score(reference, batch, temperature)[0])
    wants_old = grpo.off_policy and batch.old_logprobs is None
    wants_floor = grpo.loss.top_entropy < 1 and batch.entropy_floor is None
    if wants_old or wants_floor:
        old, entropy = score(params, batch, temperature)
        batch = batch._replace(old_logprobs=old) if wants_old else batch
        if wants_floor:
            floor = entropy_floor(entropy, beside(completion_mask(batch), entropy), grpo.loss.top_entropy)
            batch = batch._replace(entropy_floor=floor)
    return batch


def minibatches(batch: GroupBatch, grpo: GrpoConfig) -> list[GroupBatch]:
    """The updates of one step. Without lag the first is on-policy, so its ratio is 1 by definition, not up to
    rounding."""
    batch = own_rows(batch) if not alone() else batch
    rows = len(batch.completion_tokens)
    size = rows // grpo.minibatches

    def cut(start: int) -> GroupBatch:
        return jax.tree.map(lambda x: x if x.ndim == 0 else x[start : start + size], batch)

    parts = [cut(start) for start in range(0, rows, size)] * grpo.passes
    return parts if grpo.lag else [parts[0]._replace(old_logprobs=None), *parts[1:]]


def learn(
    update: CompiledUpdate, state: TrainState, frozen: Params, parts: Sequence[GroupBatch]
) -> tuple[TrainState, dict[str, float]]:
    """The updates of one step, one after another, and their metrics over all of them; the state is donated."""
    found = []
    for part in parts:
        state, means = update(state, part, frozen)
        found.append(to_host(means))
    return state, values(merge(found))


def advantages_of(graded: Graded, sampled: Sampled, config: Config) -> tuple[Float[Array, "P G"], dict[str, float]]:
    """Advantages of the step, and how much signal its groups carry; a group with too few verdicts is in none of it."""
    grpo, combined = config.grpo, graded.combined
    lengths = jnp.asarray(sampled.rollouts.lengths)
    penalty = soft_overlong_penalty(lengths, grpo.sampler.max_new_tokens, grpo.loss.overlong_buffer)
    rewards = jnp.asarray(combined.rewards_P_G, jnp.float32) + penalty
    valid = jnp.asarray(combined.valid_P_G) & enough_verdicts(graded, config.judge.min_valid)
    terms, weights = (
        jnp.asarray(combined.terms_P_G_K, jnp.float32),
        jnp.asarray(combined.term_weights_K, jnp.float32),
    )
    advantages = group_advantages(rewards, valid, grpo.advantage, terms, weights, lengths)
    groups = group_diagnostics(rewards, valid, grpo.advantage, terms, weights)
    named = {
        "dead_groups": groups.dead,
        "silent_groups": groups.silent,
        "group_spread": groups.spread,
        "group_std": groups.std,
        **{f"spread/{name}": mean for name, mean in zip(combined.term_names, groups.term_spread, strict=True)},
    }
    return advantages, values(to_host(named))


def enough_verdicts(graded: Graded, least: int) -> Bool[Array, "P 1"]:
    """Groups with at least so many verdicts; the others leave the update, KL included."""
    return jnp.asarray(graded.combined.valid_P_G.sum(-1, keepdims=True) >= least)


def rollout_metrics(sampled: Sampled, graded: Graded) -> dict[str, float]:
    """Lengths, truncation, signs of reward hacking, and tokens handled in the step."""
    lengths = sampled.rollouts.lengths
    replies: Sequence[str] = [p.response for row in graded.parsed_P_G for p in row if isinstance(p, Spans)]
    combined = graded.combined
    signs = hacking_signs(
        replies, lengths.ravel().astype(np.float64), combined.rewards_P_G.ravel(), combined.valid_P_G.ravel()
    )
    return {
        "completion_tokens": float(lengths.mean()),
        "completion_tokens_max": float(lengths.max()),
        "truncated": float(1 - np.asarray(sampled.rollouts.stopped).mean()),
        "tokens": float(lengths.sum() + sampled.prompt_lengths.sum()),
        **{f"hacking/{name}": value for name, value in signs.items()},
    }
