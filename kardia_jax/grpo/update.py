"""One update: micro-batch scan, sums before division, one step of the optimizer.

The objective comes in as a function of the batch's log-probs, so GRPO in all its variants and supervised fine-tuning
are the same program. It returns a loss that is not divided yet, ``Mean(sum, weight)``: gradients of the sums are added
over micro-batches and divided once by the summed weight, so the split never changes the result. ``make_accumulate``
adds one micro-batch and ``apply_sums`` divides and steps: ``make_update`` makes one program of them, for micro-batches
of one shape; where shapes differ, each is a program of its own.

A gradient that is not finite changes nothing but the count of bad steps. A batch without a single kept token (every
verdict missing) is no evidence: parameters, moments and schedule stay as they are, where a gradient of 0 would still
have decayed the weights and moved them by the momentum of earlier steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.grpo.losses import LossFn, LossInputs
from kardia_jax.model.sharding import active, constrain, constrain_tree, row_shards
from kardia_jax.placement import on_device, where_it_was
from kardia_jax.types import GroupBatch, Mean, Params, TrainState

Forward = Callable[[Params, GroupBatch, Int[Array, ""]], tuple[Float[Array, "P G T"], Float[Array, "P G T"]]]
"""(what is trained, batch, place among the micro-batches) -> log-prob of each completion token, entropy of its
distribution."""

Objective = Callable[[GroupBatch, Float[Array, "P G T"], Float[Array, "P G T"]], tuple[Mean, dict[str, Mean]]]
"""(batch, policy_logprobs, entropy) -> undivided loss and undivided metrics."""

Update = Callable[[TrainState, GroupBatch], tuple[TrainState, dict[str, Mean]]]


class Sums(NamedTuple):
    """What micro-batches add up; nothing in it is divided yet."""

    gradient: Params
    """Of the sum of the loss."""
    loss: Mean
    tokens: Int[Array, ""]
    """That were kept."""


Accumulate = Callable[[Sums, Params, GroupBatch, Int[Array, ""]], tuple[Sums, dict[str, Mean]]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def completion_mask(batch: GroupBatch) -> Bool[Array, "P G T"]:
    """Completion tokens that may contribute to the loss."""
    steps = jnp.arange(batch.completion_tokens.shape[-1])
    return (steps < batch.completion_lengths[..., None]) & batch.loss_rows[..., None]


def grpo_objective(loss: LossFn) -> Objective:
    """A policy-gradient loss over rows as an objective over groups."""

    def objective(batch: GroupBatch, policy_logprobs: Array, entropy: Array) -> tuple[Mean, dict[str, Mean]]:
        def rows(x: Array | None) -> Array | None:
            return None if x is None else x.reshape(-1, x.shape[-1])

        inputs = LossInputs(
            policy_logprobs=policy_logprobs.reshape(-1, policy_logprobs.shape[-1]),
            advantages=batch.advantages.reshape(-1),
            mask=completion_mask(batch).reshape(-1, policy_logprobs.shape[-1]),
            old_logprobs=rows(batch.old_logprobs),
            ref_logprobs=rows(batch.ref_logprobs),
            sampler_logprobs=rows(batch.sampler_logprobs),
            entropy=rows(entropy),
            entropy_floor=batch.entropy_floor,
        )
        return loss(inputs)

    return objective


def sft_objective(batch: GroupBatch, policy_logprobs: Array, entropy: Array) -> tuple[Mean, dict[str, Mean]]:
    """Token-mean negative log-likelihood of the completions."""
    mask = completion_mask(batch)
    count = mask.sum().astype(jnp.float32)
    loss = Mean(-jnp.where(mask, policy_logprobs, 0.0).sum(), count)
    return loss, {"entropy": Mean(jnp.where(mask, entropy, 0.0).sum(), count)}


def split(batch: GroupBatch, parts: int) -> GroupBatch:
    """[P, ...] -> [M, P/M, ...] for every array with a prompt axis; scalars are repeated.

    On a mesh every micro-batch takes its share from each device, so that none has to move.
    """
    shards = row_shards(active())

    def cut(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        if shards == 1:
            return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
        apart = x.reshape(shards, parts, x.shape[0] // (shards * parts), *x.shape[1:])
        return constrain(jnp.swapaxes(apart, 0, 1).reshape(parts, -1, *x.shape[1:]), ".P" + "." * (x.ndim - 1))

    return jax.tree.map(cut, batch)


def no_sums(params: Params) -> Sums:
    """What accumulation starts from."""
    return Sums(
        constrain_tree(jax.tree.map(jnp.zeros_like, params)), Mean(jnp.float32(0), jnp.float32(0)), jnp.int32(0)
    )


def make_accumulate(forward: Forward, objective: Objective) -> Accumulate:
    """Adds one micro-batch: (sums, params, batch, place) -> (sums, the micro-batch's undivided metrics)."""

    def undivided(
        params: Params, batch: GroupBatch, place: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Mean, dict[str, Mean]]]:
        loss, metrics = objective(batch, *forward(params, batch, place))
        return loss.sum, (loss, metrics)

    def accumulate(
        sums: Sums, params: Params, batch: GroupBatch, place: Int[Array, ""]
    ) -> tuple[Sums, dict[str, Mean]]:
        gradient, (loss, metrics) = jax.grad(undivided, has_aux=True)(params, batch, place)
        return jax.tree.map(jnp.add, sums, Sums(constrain_tree(gradient), loss, completion_mask(batch).sum())), metrics

    return accumulate


def apply_sums(
    state: TrainState, sums: Sums, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Mean]]:
    """The one division, then the optimizer; ``loss`` and ``grad_norm``-like scalars of weight 1 beside the state."""
    weight = jnp.maximum(sums.loss.weight, 1e-8)
    gradient = jax.tree.map(lambda g: g / weight, sums.gradient)
    state, norms = apply_gradient(state, gradient, jnp.isfinite(sums.loss.sum), sums.tokens > 0, optimizer)
    return state, norms | {"loss": sums.loss}


def make_update(
    forward: Forward, objective: Objective, optimizer: optax.GradientTransformation, micro_batches: int = 1
) -> Update:
    """The function (state, batch) -> (state, undivided metrics), over micro-batches of equal shape."""
    accumulate = make_accumulate(forward, objective)

    def update(state: TrainState, batch: GroupBatch) -> tuple[TrainState, dict[str, Mean]]:
        def add(sums: Sums, piece: tuple[GroupBatch, Int[Array, ""]]) -> tuple[Sums, dict[str, Mean]]:
            return accumulate(sums, state.params, *piece)

        pieces = split(batch, micro_batches), jnp.arange(micro_batches)
        sums, metrics = jax.lax.scan(add, no_sums(state.params), pieces)
        state, norms = apply_sums(state, sums, optimizer)
        return state, jax.tree.map(lambda x: x.sum(0), metrics) | norms

    return update


def apply_gradient(
    state: TrainState,
    gradient: Params,
    loss_finite: Bool[Array, ""],
    evidence: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Mean]]:
    """One optimizer step; none at all without evidence, or when the loss or the gradient is not finite.

    An optimizer state that lives in host memory is fetched for the step and goes back there.
    """
    norm = optax.tree.norm(gradient)
    good = jnp.isfinite(norm) & loss_finite
    before = on_device(state.opt_state)
    changes, opt_state = optimizer.update(gradient, before, state.params)
    params = optax.apply_updates(state.params, changes)

    steps = good & evidence

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(steps, new, old)

    new = TrainState(
        step=state.step + 1,
        params=jax.tree.map(choose, params, state.params),
        opt_state=where_it_was(jax.tree.map(choose, opt_state, before), state.opt_state),
        bad_steps=jnp.where(good, jnp.where(evidence, 0, state.bad_steps), state.bad_steps + 1),
    )
    one = jnp.float32(1)
    norms = {
        "grad_norm": Mean(norm, one),
        "update_norm": Mean(jnp.where(steps, optax.tree.norm(changes), 0.0), one),
        "skipped": Mean((~steps).astype(jnp.float32), one),
    }
    return new, norms
