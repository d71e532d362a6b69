"""Losses and gradients against TRL 1.16.0 (grpo_golden.json) and a second implementation in plain numpy.

The fixture prints 10 decimals, so 1e-9 is what it can settle. The numpy implementation loops over rows and
tokens; it takes complex log-probs, whose imaginary part carries an exact derivative, and settles 1e-12.
"""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import LossConfig
from kardia_jax.grpo.correction import chi_squared, effective_sample_share
from kardia_jax.grpo.losses import LEVELS, LossInputs, entropy_floor, make_loss

PRINTED = 1e-9
EXACT = 1e-12
GOLDEN = json.loads((pathlib.Path(__file__).parent / "grpo_golden.json").read_text())
LONGEST = 8


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _data(scale: str = "group", masked_row: int | None = None) -> dict[str, np.ndarray]:
    i, t = np.meshgrid(np.arange(4), np.arange(5), indexing="ij")
    policy = -(1 + ((3 * i + 5 * t) % 7) / 4)
    old = policy + (((2 * i + 3 * t) % 7) - 3) / 10
    rewards = np.array([1, 0, 0.5, 0.25])
    centred = rewards - rewards.mean()
    mask = t < np.array([5, 3, 1, 4])[:, None]
    if masked_row is not None:
        mask = mask & (i != masked_row)
    return {
        "policy": policy,
        "old": old,
        "ref": policy + (((i + 2 * t) % 4) - 1.5) / 4,
        "sampler": old + (((i + t) % 3) - 1) / 10,
        "entropy": 0.5 + ((i + t) % 3) / 4,
        "mask": mask,
        "advantages": centred / (rewards.std(ddof=1) + 1e-4) if scale == "group" else centred,
    }


def _inputs(data: dict[str, np.ndarray], config: LossConfig, policy: jax.Array | None = None) -> LossInputs:
    """What the config needs, as the update would hand it over."""
    entropy, mask = jnp.asarray(data["entropy"]), jnp.asarray(data["mask"])
    return LossInputs(
        policy_logprobs=jnp.asarray(data["policy"]) if policy is None else policy,
        advantages=jnp.asarray(data["advantages"]),
        mask=mask,
        old_logprobs=jnp.asarray(data["old"]),
        ref_logprobs=jnp.asarray(data["ref"]) if config.beta > 0 else None,
        sampler_logprobs=jnp.asarray(data["sampler"]) if config.correction != "none" else None,
        entropy=entropy,
        entropy_floor=entropy_floor(entropy, mask, config.top_entropy) if config.top_entropy < 1 else None,
    )


def _loss_and_gradient(config: LossConfig, data: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    loss = make_loss(config, LONGEST)

    def value(policy: jax.Array) -> jax.Array:
        mean, _ = loss(_inputs(data, config, policy))
        return mean.sum / mean.weight

    result, gradient = jax.value_and_grad(value)(jnp.asarray(data["policy"]))
    return float(result), np.asarray(gradient)


# ---- the second implementation ----


def _smaller(a: complex, b: complex) -> complex:
    return a if a.real <= b.real else b


def _bounded(x: complex, low: float, high: float) -> complex:
    return low if x.real < low else high if x.real > high else x


def _plain_term(config: LossConfig, w: complex, lp: complex, a: float, log_product: float) -> complex:
    low, high = config.ratio_bounds
    if config.name == "cispo":
        return -_bounded(w, low, high).real * a * lp
    if config.name == "sapo":
        tau = config.sapo_temperatures[0 if a > 0 else 1]
        return -4 / tau / (1 + np.exp(-tau * (w - 1))) * a
    if config.name == "vespo":
        k, lam = config.vespo_positive if a >= 0 else config.vespo_negative
        product = np.exp(log_product)
        return -np.exp(lam) * product**k * np.exp(-lam * product) * a * lp
    capped = w if config.delta is None else _smaller(w, config.delta)
    loss = -_smaller(capped * a, _bounded(w, low, high) * a)
    return _smaller(loss, -config.dual_clip * a) if config.dual_clip and a < 0 else loss


def _plain_kl(config: LossConfig, d: complex, w: complex) -> complex:
    widest, largest = {"none": (9e9, 9e9), "verl": (20, 10), "openrlhf": (9e9, 10)}[config.kl_clamp]
    d = _bounded(d, -widest, widest)
    k2, k3 = d**2 / 2, np.exp(d) - d - 1
    k3_plus = k3.real + 1j * k2.imag
    value = {"k1": -d, "k2": k2, "k3+": k3_plus}.get(config.kl, k3)
    value = _bounded(value, -largest, largest)
    return w * value if config.kl.startswith("k3_unbiased") else value


def _plain_weight(config: LossConfig, log_rhos: list[float], t: int) -> float:
    if config.correction == "none":
        return 1.0
    scope, how = (config.correction + "_mis").split("_")[:2]
    total = {"sequence": sum(log_rhos), "geometric": sum(log_rhos) / len(log_rhos)}
    rho = np.exp(total.get(scope, log_rhos[t]))
    floor, cap = config.correction_floor, config.correction_cap
    if how == "tis":
        return max(min(rho, cap), floor)
    return rho if floor <= rho <= cap else 0.0


def _plain_row(config: LossConfig, data: dict[str, np.ndarray], i: int, policy: np.ndarray) -> list[complex]:
    """Loss of every kept token of row i (kept tokens stand at the front)."""
    length, a = int(data["mask"][i].sum()), float(data["advantages"][i])
    lp, old, ref, smp = (x[i, :length] for x in (policy, data["old"], data["ref"], data["sampler"]))
    gaps, log_rhos = list(lp - old), list(old - smp)
    weights = [_plain_weight(config, log_rhos, t) for t in range(length)]
    level = {"gspo": "sequence", "luspo": "sequence"}.get(config.name, "token")
    level = level if config.importance == "auto" else config.importance
    behaviour = smp if config.correction != "none" else old
    drift = float(np.mean((behaviour - lp).real)) if length else 0.0
    far = config.off_policy_threshold is not None and a < 0 and drift > config.off_policy_threshold
    floor = np.quantile(data["entropy"][data["mask"]], 1 - config.top_entropy)
    with np.errstate(divide="ignore"):
        log_product = sum(gap.real + np.log(weight) for gap, weight in zip(gaps, weights, strict=True))
    losses = []
    for t in range(length):
        row = sum(gaps) / length
        log_w = {"token": gaps[t], "sequence": row, "sequence_token": row.real + 1j * gaps[t].imag}[level]
        term = _plain_term(config, np.exp(log_w), lp[t], a, log_product)
        term = 0.0 if far or data["entropy"][i, t] < floor else term
        kl_log_w = gaps[t] if config.kl == "k3_unbiased_token" else log_w
        kl = config.beta * _plain_kl(config, ref[t] - lp[t], np.exp(kl_log_w))
        weight = 1.0 if config.name == "vespo" else weights[t]
        after = config.kl_order == "weight_then_kl"
        losses.append(weight * term + kl if after else weight * (term + kl))
    return losses


def _plain_loss(config: LossConfig, data: dict[str, np.ndarray], policy: np.ndarray) -> complex:
    rows = [_plain_row(config, data, i, policy) for i in range(len(policy))]
    tokens = sum(len(row) for row in rows)
    counted = len(rows) if config.empty_rows == "count" else sum(len(row) > 0 for row in rows)
    presets = {"bnpo": "token_mean", "dapo": "token_mean", "cispo": "token_mean", "vespo": "token_mean"}
    presets |= {"dr_grpo": "fixed_length", "luspo": "sequence_sum"}
    name = presets.get(config.name, "sequence_mean") if config.aggregation == "auto" else config.aggregation
    if name == "sequence_mean":
        return sum(sum(row) / max(len(row), 1) for row in rows) / counted
    divisor = {"fixed_length": counted * LONGEST, "sequence_sum": counted}.get(name, tokens)
    return sum(sum(row) for row in rows) / divisor


def _plain_gradient(config: LossConfig, data: dict[str, np.ndarray]) -> np.ndarray:
    """Complex-step derivative: exact to rounding, without a subtraction."""
    gradient, step = np.zeros_like(data["policy"]), 1e-30
    for i, t in np.argwhere(data["mask"]):
        bumped = data["policy"].astype(complex)
        bumped[i, t] += 1j * step
        gradient[i, t] = np.imag(_plain_loss(config, data, bumped)) / step
    return gradient


# ---- the 21 rows ----

DAPO_TIS = {"name": "dapo", "clip_high": 0.2, "correction_cap": 1.05}
CASES: dict[str, tuple[dict, dict]] = {
    "grpo": ({}, {}),
    "grpo, beta 0.04, plain k3": ({"beta": 0.04, "kl": "k3"}, {}),
    "grpo, beta 0.04, w k3": ({"beta": 0.04}, {}),
    "bnpo": ({"name": "bnpo"}, {}),
    "dapo, eps high 0.28": ({"name": "dapo"}, {}),
    "dr_grpo, A none, Lmax 8": ({"name": "dr_grpo"}, {"scale": "none"}),
    "grpo, delta 1.05": ({"delta": 1.05}, {}),
    "GSPO (grpo, sequence, eps 0.01)": ({"name": "gspo", "clip_low": 0.01, "clip_high": 0.01}, {}),
    "cispo, cap 1.2": ({"name": "cispo", "clip_high": 1.2}, {}),
    "cispo, cap 5": ({"name": "cispo"}, {}),
    "sapo 1.0 / 1.05": ({"name": "sapo"}, {}),
    "luspo, sequence, eps 0.01": ({"name": "luspo", "clip_low": 0.01, "clip_high": 0.01}, {}),
    "vespo": ({"name": "vespo"}, {}),
    "dapo + token TIS 1.05": (DAPO_TIS | {"correction": "token_tis"}, {}),
    "dapo + token MIS 1.05": (DAPO_TIS | {"correction": "token_mis"}, {}),
    "dapo + sequence TIS 1.05": (DAPO_TIS | {"correction": "sequence_tis"}, {}),
    "dapo + sequence MIS 1.05": (DAPO_TIS | {"correction": "sequence_mis"}, {}),
    "grpo, off-policy mask 0.02": ({"off_policy_threshold": 0.02}, {}),
    "grpo, top-entropy 0.5": ({"top_entropy": 0.5}, {}),
    "grpo, row 2 fully masked (TRL: N = 4)": ({}, {"masked_row": 2}),
    "dapo eps high 0.28, row 2 fully masked": ({"name": "dapo"}, {"masked_row": 2}),
}


def _case(name: str) -> tuple[LossConfig, dict[str, np.ndarray]]:
    settings_, data = CASES[name]
    return LossConfig(**({"beta": 0.0} | settings_)), _data(**data)


def test_every_row_of_the_fixture_has_a_case():
    assert [row["case"] for row in GOLDEN["cases"]] == list(CASES)
    assert len(CASES) == 21


@pytest.mark.parametrize("row", GOLDEN["cases"], ids=lambda row: row["case"])
def test_loss_and_gradient_equal_trl(row: dict):
    loss, gradient = _loss_and_gradient(*_case(row["case"]))
    assert loss == pytest.approx(row["loss"], abs=PRINTED)
    assert np.abs(gradient).sum() == pytest.approx(row["g1"], abs=PRINTED)
    assert gradient[0, 0] == pytest.approx(row["g00"], abs=PRINTED)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_plain_numpy(name: str):
    config, data = _case(name)
    loss, gradient = _loss_and_gradient(config, data)
    assert loss == pytest.approx(_plain_loss(config, data, data["policy"].astype(complex)).real, abs=EXACT)
    np.testing.assert_allclose(gradient, _plain_gradient(config, data), rtol=0, atol=EXACT)


# ---- numbers that come from formulas only ----

FORMULAS: dict[str, tuple[dict, dict, float]] = {
    "empty row left out of N": ({"empty_rows": "skip"}, {"masked_row": 2}, 0.0752011625),
    "cispo band": ({"name": "cispo", "cispo_clip": "band"}, {}, 0.1837548864),
    "dual clip": ({"name": "dapo", "clip_high": 0.2, "dual_clip": 1.05}, {}, -0.1474766085),
    "geometric TIS": (DAPO_TIS | {"correction": "geometric_tis"}, {}, -0.1275840961),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_only_values(name: str):
    settings_, data_, expected = FORMULAS[name]
    config, data = LossConfig(**({"beta": 0.0} | settings_)), _data(**data_)
    loss, gradient = _loss_and_gradient(config, data)
    assert loss == pytest.approx(expected, abs=PRINTED)
    np.testing.assert_allclose(gradient, _plain_gradient(config, data), rtol=0, atol=EXACT)


def _metrics(**settings_) -> dict[str, float]:
    config, data = LossConfig(**settings_), _data()
    inputs = _inputs(data, config)._replace(
        ref_logprobs=jnp.asarray(data["ref"]), sampler_logprobs=jnp.asarray(data["sampler"])
    )
    _, metrics = make_loss(config, LONGEST)(inputs)
    return {name: float(mean.sum / mean.weight) for name, mean in metrics.items()}


@pytest.mark.parametrize(("kl", "expected"), [("k1", 0.0096153846), ("k2", 0.0366586538), ("k3", 0.0370211577)])
def test_kl_token_means(kl: str, expected: float):
    assert _metrics(kl=kl, beta=0.0)["kl"] == pytest.approx(expected, abs=PRINTED)


def test_ratio_weighted_kl_metric_and_clip_shares():
    metrics = _metrics()
    # The document prints six decimals of this one.
    assert metrics["kl"] == pytest.approx(0.033144, abs=5e-7)
    assert metrics["clip_low"] == pytest.approx(1 / 13, abs=EXACT)
    assert metrics["clip_high"] == pytest.approx(1 / 13, abs=EXACT)
    assert metrics["clip_region"] == pytest.approx(2 / 13, abs=EXACT)


def test_sequence_ratios():
    data = _data()
    log_ratio, mask = jnp.asarray(data["policy"] - data["old"]), jnp.asarray(data["mask"])
    row = jnp.exp(LEVELS["sequence"](log_ratio, jnp.ones((4, 1)), mask).log_ratio)[:, 0]
    np.testing.assert_allclose(row, [0.9801986733, 1.0338951135, 0.9048374180, 0.9512294245], atol=PRINTED)


def test_mismatch_diagnostics():
    metrics = _metrics()
    ratio, squared = metrics["mismatch_ratio"], metrics["mismatch_ratio_squared"]
    assert metrics["mismatch_exp_abs"] == pytest.approx(1.0728106356, abs=PRINTED)
    assert chi_squared(squared) == pytest.approx(0.0293797541, abs=PRINTED)
    assert effective_sample_share(ratio, squared) == pytest.approx(0.9932815099, abs=PRINTED)


# ---- any combination, on random numbers ----


@st.composite
def _configs(draw: st.DrawFn) -> LossConfig:
    name = draw(st.sampled_from(["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo", "sapo", "luspo", "vespo"]))
    clipped, token_only = name not in ("cispo", "sapo", "vespo"), name in ("cispo", "sapo")
    levels = ["auto"] if name == "vespo" else ["auto", "token"] if token_only else ["auto", "sequence_token"]
    whole = ["none", "token_tis", "token_mis", "icepop"]
    extra = [] if name == "vespo" else ["sequence_tis", "sequence_mis", "geometric_tis", "geometric_mis"]
    return LossConfig(
        name=name,
        importance=draw(st.sampled_from(levels)),
        aggregation=draw(st.sampled_from(["auto", "sequence_mean", "token_mean", "fixed_length", "sequence_sum"])),
        clip_low=0.1 if clipped else None,
        clip_high=0.15 if clipped else None,
        delta=draw(st.sampled_from([None, 1.3])) if clipped else None,
        dual_clip=draw(st.sampled_from([None, 1.2])) if clipped else None,
        cispo_clip=draw(st.sampled_from(["cap", "band"])) if name == "cispo" else "cap",
        beta=draw(st.sampled_from([0.0, 0.1])),
        kl=draw(st.sampled_from(["k1", "k2", "k3", "k3_unbiased", "k3_unbiased_token", "k3+"])),
        kl_clamp=draw(st.sampled_from(["none", "verl", "openrlhf"])),
        kl_order=draw(st.sampled_from(["weight_then_kl", "kl_then_weight"])),
        correction=draw(st.sampled_from(whole + extra)),
        correction_cap=1.1,
        correction_floor=0.8,
        off_policy_threshold=draw(st.sampled_from([None, 0.01])),
        top_entropy=draw(st.sampled_from([1.0, 0.6])),
        empty_rows=draw(st.sampled_from(["count", "skip"])),
    )


@settings(deadline=None, max_examples=30)
@given(config=_configs(), seed=st.integers(0, 10_000))
def test_any_combination_equals_plain_numpy(config: LossConfig, seed: int):
    rng = np.random.default_rng(seed)
    data = _data(masked_row=int(rng.integers(0, 5)))
    for name, spread in (("policy", 0.5), ("old", 0.2), ("ref", 0.5), ("sampler", 0.1), ("entropy", 0.3)):
        data[name] = data[name] + spread * rng.standard_normal((4, 5))
    data["advantages"] = rng.standard_normal(4)
    loss, gradient = _loss_and_gradient(config, data)
    assert loss == pytest.approx(_plain_loss(config, data, data["policy"].astype(complex)).real, abs=EXACT)
    np.testing.assert_allclose(gradient, _plain_gradient(config, data), rtol=0, atol=EXACT)
