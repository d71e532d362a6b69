"""One update: micro-batch scan, sums before division, one step of the optimizer.

The objective comes in as a function of the batch's log-probs, so GRPO in all its variants and supervised fine-tuning
are the same program. It returns a loss that is not divided yet, ``Mean(sum, weight)``: gradients of the sums are added
over micro-batches and divided once by the summed weight, so the split never changes the result.

A gradient that is not finite changes nothing but the count of bad steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.grpo.losses import LossFn, LossInputs
from kardia_jax.types import GroupBatch, Mean, Params, TrainState

Forward = Callable[[Params, GroupBatch, Int[Array, ""]], tuple[Float[Array, "P G T"], Float[Array, "P G T"]]]
"""(what is trained, batch, place among the micro-batches) -> log-prob of each completion token, entropy of its
distribution."""

Objective = Callable[[GroupBatch, Float[Array, "P G T"], Float[Array, "P G T"]], tuple[Mean, dict[str, Mean]]]
"""(batch, policy_logprobs, entropy) -> undivided loss and undivided metrics."""

Update = Callable[[TrainState, GroupBatch], tuple[TrainState, dict[str, Mean]]]


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
    """[P, ...] -> [M, P/M, ...] for every array with a prompt axis; scalars are repeated."""

    def cut(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(cut, batch)


def make_update(
    forward: Forward, objective: Objective, optimizer: optax.GradientTransformation, micro_batches: int = 1
) -> Update:
    """The function (state, batch) -> (state, metrics); metrics are undivided means and ``grad_norm``-like scalars
    of weight 1."""

    def undivided(
        params: Params, batch: GroupBatch, place: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Mean, dict[str, Mean]]]:
        loss, metrics = objective(batch, *forward(params, batch, place))
        return loss.sum, (loss, metrics)

    def update(state: TrainState, batch: GroupBatch) -> tuple[TrainState, dict[str, Mean]]:
        gradient_of = jax.grad(undivided, has_aux=True)
        pieces = split(batch, micro_batches), jnp.arange(micro_batches)
        first = jax.tree.map(lambda x: x[0], pieces)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, state.params, *first))

        def add(total, piece: tuple[GroupBatch, Int[Array, ""]]):
            return jax.tree.map(jnp.add, total, gradient_of(state.params, *piece)), None

        (gradient, (loss, metrics)), _ = jax.lax.scan(add, zeros, pieces)
        weight = jnp.maximum(loss.weight, 1e-8)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        state, norms = apply_gradient(state, gradient, jnp.isfinite(loss.sum), optimizer)
        return state, metrics | norms | {"loss": loss}

    return update


def apply_gradient(
    state: TrainState, gradient: Params, loss_finite: Bool[Array, ""], optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Mean]]:
    """One optimizer step, or none at all when the loss or the gradient is not finite."""
    norm = optax.tree.norm(gradient)
    good = jnp.isfinite(norm) & loss_finite
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(good, new, old)

    new = TrainState(
        step=state.step + 1,
        params=jax.tree.map(choose, params, state.params),
        opt_state=jax.tree.map(choose, opt_state, state.opt_state),
        bad_steps=jnp.where(good, 0, state.bad_steps + 1),
    )
    one = jnp.float32(1)
    norms = {
        "grad_norm": Mean(norm, one),
        "update_norm": Mean(jnp.where(good, optax.tree.norm(changes), 0.0), one),
        "skipped": Mean((~good).astype(jnp.float32), one),
    }
    return new, norms
