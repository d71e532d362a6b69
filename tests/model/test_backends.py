"""Every attention backend against one plain softmax, in values and gradients; which is chosen; what it compiles to.

cuDNN and compiled splash run where their device is: ``JAX_PLATFORMS=cuda,cpu python -m pytest tests/model`` (or
``tpu,cpu``). Elsewhere splash is interpreted, and cuDNN is lowered and its place taken by a textbook kernel.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import ConfigError
from kardia_jax.model import backends, policy, splash
from kardia_jax.model.attention import Part, Scoring, attend, causal, within
from kardia_jax.model.backends import Layer, Machine, chosen, completion_attention, obstacle, prompt_attention
from kardia_jax.model.fused import Kernel
from kardia_jax.model.policy import Compute
from kardia_jax.model.shapes import TINY, TINY_GEMMA2, TINY_GEMMA3

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Of the largest value: float32 sums of up to 20 keys in another order; eight bits, rounded a few times."""

HOPPER, AMPERE, TPU, CPU = Machine("gpu", (9, 0)), Machine("gpu", (8, 6)), Machine("tpu"), Machine("cpu")


def kept(q, keys):
    return causal(q.shape[2]) if keys.lengths is None else within(keys.lengths[:, None], keys.k.shape[2])


def textbook_forward(q, keys, scoring):
    return attend(q, keys.k, keys.v, kept(q, keys), scoring)


def textbook_backward(q, keys, scoring, merged, d_out):
    """The formula of ``fused.py`` with all scores in memory."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (keys.k, keys.v))
    scores = jnp.einsum("BHTE,BHSE->BHTS", q, k) * scoring.scale
    slope = jnp.ones_like(scores)
    if scoring.softcap is not None:
        slope = 1 - jnp.tanh(scores / scoring.softcap) ** 2
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    weights = jnp.where(kept(q, keys)[:, None], jnp.exp(scores - merged.lse[..., None]), 0)
    d_weights = jnp.einsum("BHTE,BHSE->BHTS", d_out, v) - (d_out * merged.out).sum(-1, keepdims=True)
    d_scores = weights * d_weights * slope * scoring.scale
    d_k = jnp.einsum("BHTS,BHTE->BHSE", d_scores, q)
    d_v = jnp.einsum("BHTS,BHTE->BHSE", weights, d_out)
    d_k, d_v = (x.reshape(*keys.k.shape[:2], -1, *x.shape[2:]).sum(2) for x in (d_k, d_v))
    return jnp.einsum("BHTS,BHSE->BHTE", d_scores, k), d_k, d_v


TEXTBOOK = Kernel(textbook_forward, textbook_backward)


@pytest.fixture
def use(monkeypatch):
    """``use(kernel)`` puts it in splash's place, the one that refuses no type and no cap; the machine is then a TPU."""

    def replace(kernel):
        monkeypatch.setattr(backends, "machine", lambda: TPU)
        monkeypatch.setitem(backends.KERNELS, "splash", kernel)

    return replace


@pytest.fixture(params=["xla", "xla bfloat16", "textbook", "splash interpreted", "splash", "cudnn bfloat16"])
def backend(request, use):
    """(name for the dispatch, type) of everything that runs on this machine."""
    name, _, kind = request.param.partition(" ")
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(request.param.split(" ")[0])
    if kind == "interpreted":
        use(splash.kernel(interpret=True))
    elif needed not in (None, jax.default_backend()):
        pytest.skip(f"{name} needs a {needed}")
    if name == "textbook":
        use(TEXTBOOK)
    return "splash" if name == "textbook" else name, "bfloat16" if kind == "bfloat16" else "float32"


def draw(seed, prompts, group, kv_heads, ratio, length, size, dim):
    """q, k, v of completions, then k and v of prompts, of values that bfloat16 holds."""
    heads, rng = kv_heads * ratio, np.random.default_rng(seed)
    own, prompt = (prompts, group, kv_heads, length, dim), (prompts, kv_heads, size, dim)
    shapes = ((prompts, group, heads, length, dim), own, own, prompt, prompt)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32) for shape in shapes]


def repeated_form(q, k, v, prompt_k, prompt_v, lengths, scoring):
    """Each completion behind its own copy of the prompt, in one softmax."""
    group, length, size = q.shape[1], q.shape[3], prompt_k.shape[2]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    keys, values = (jnp.concatenate([x.repeat(group, 0), y], 2) for x, y in ((prompt_k, k), (prompt_v, v)))
    lengths = jnp.repeat(lengths.reshape(-1, 1), length, 1)
    keep = jnp.concatenate([within(lengths, size), causal(length).repeat(q.shape[0], 0)], 2)
    return attend(q, keys, values, keep, scoring).out.reshape(-1, group, *q.shape[1:])


def values_and_gradients(function, arrays, dtype, weights):
    """The output, and the gradients of its weighted sum, in float32."""

    def loss(*arrays):
        out = function(*arrays).astype(jnp.float32)
        return (out * weights).sum(), out

    arrays = [x.astype(dtype) for x in arrays]
    (_, out), grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return [x.astype(jnp.float32) for x in (out, *grads)]


def assert_equal(ours, wanted, dtype):
    for got, want in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * float(jnp.abs(want).max()), rtol=0)


def compare_completions(backend, lengths, softcap=None, seed=0, kv_heads=2, ratio=2, length=5, size=9, dim=16):
    name, dtype = backend
    arrays = draw(seed, *lengths.shape, kv_heads, ratio, length, size, dim)
    scoring = Scoring(0.3, softcap)
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=arrays[0].shape), jnp.float32)

    def ours(*arrays):
        return completion_attention(name, *arrays, lengths, scoring, None)

    def plain(*arrays):
        return repeated_form(*arrays, lengths, scoring)

    wanted = values_and_gradients(plain, arrays, "float32", weights)
    assert_equal(values_and_gradients(ours, arrays, dtype, weights), wanted, dtype)


@pytest.mark.parametrize("lengths", [((9, 9, 9), (6, 6, 6)), ((9, 1, 4), (2, 2, 7))], ids=["question", "conversation"])
def test_completions_equal_the_repeated_form(backend, lengths):
    compare_completions(backend, jnp.array(lengths))


def test_a_prompt_equals_the_textbook(backend):
    name, dtype = backend
    _, q, _, k, v = draw(1, 2, 4, 2, 1, 9, 9, 16)
    q = q[:, :, 0]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    ours = functools.partial(prompt_attention, name, scoring=Scoring(0.3), window=None)

    def plain(q, k, v):
        return attend(q, k, v, causal(9), Scoring(0.3)).out

    wanted = values_and_gradients(plain, (q, k, v), "float32", weights)
    assert_equal(values_and_gradients(ours, (q, k, v), dtype, weights), wanted, dtype)


def test_splash_caps_scores(use):
    use(splash.kernel(interpret=True))
    compare_completions(("splash", "float32"), jnp.array([[9, 4]]), softcap=2.0)


def test_splash_with_several_tiles(use, monkeypatch):
    monkeypatch.setattr(splash, "LARGEST_TILE", 128)
    use(splash.kernel(interpret=True))
    compare_completions(("splash", "float32"), jnp.array([[140]]), size=140, length=130, kv_heads=1)


def test_tiles_divide_the_length():
    assert [splash._tile(length) for length in (128, 384, 640, 768, 1024)] == [128, 384, 128, 384, 512]


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=2), min_size=1, max_size=2),
    kv_heads=st.sampled_from([1, 2]),
    ratio=st.sampled_from([1, 3]),
    length=st.integers(1, 5),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_merged_kernels_are_the_repeated_form(lengths, kv_heads, ratio, length, softcap, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "machine", lambda: TPU)
        patch.setitem(backends.KERNELS, "splash", TEXTBOOK)
        compare_completions(
            ("splash", "float32"), jnp.array(lengths), softcap, seed, kv_heads, ratio, length, size=7, dim=4
        )


def test_a_merged_gradient_needs_the_merged_softmax():
    """Handing a kernel its own output and log-sum-exp, as its public form does, gives another gradient."""

    def alone(q, keys, scoring, merged, d_out):
        own = textbook_forward(q, keys, scoring)
        share = jnp.exp(own.lse - merged.lse)[..., None]
        return textbook_backward(q, keys, scoring, own, share * d_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "machine", lambda: TPU)
        patch.setitem(backends.KERNELS, "splash", Kernel(textbook_forward, alone))
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            compare_completions(("splash", "float32"), jnp.array([[9, 4]]))


SMALL = dataclasses.replace(TINY, vocab_size=40)
TOKENS = (jnp.arange(18).reshape(2, 9), jnp.array([[9, 9, 9], [4, 2, 7]]), jnp.arange(30).reshape(2, 3, 5))


def scored(spec, compute, params):
    """The sum of all log-probs of the policy."""
    keep, temperature = jnp.ones(TOKENS[2].shape, bool), jnp.float32(1)
    return policy.group_logprobs(spec, compute, params, *TOKENS, keep, temperature)[0].sum()


def test_the_policy_through_a_kernel_is_the_policy(use):
    params = policy.init(SMALL, jax.random.key(0))

    def run(attention, remat):
        compute = Compute(remat=remat, attention=attention)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(functools.partial(scored, SMALL, compute)))(params))

    wanted = run("xla", "none")
    use(TEXTBOOK)
    for remat in ("block", "dots"):
        for got, want in zip(run("auto", remat), wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()) + 1e-6)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
def test_a_policy_refuses_a_kernel_that_is_not_there():
    params = jax.eval_shape(functools.partial(policy.init, SMALL), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"model\.attention: wanted an NVIDIA GPU .* for cudnn"):
        jax.jit(functools.partial(scored, SMALL, Compute(attention="cudnn"))).trace(params)


def lowered(monkeypatch, where, spec, dtype="bfloat16"):
    """What the learner's gradient lowers to on this machine."""
    monkeypatch.setattr(backends, "machine", lambda: where)
    params = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    gradient = jax.jit(jax.grad(functools.partial(scored, spec, Compute(dtype, remat="none"))))
    platform = {"gpu": "cuda"}.get(where.platform, where.platform)
    return gradient.trace(params).lower(lowering_platforms=(platform,)).as_text()


def test_a_gpu_runs_cudnn_on_prompt_and_both_parts_of_a_completion(monkeypatch):
    text = lowered(monkeypatch, AMPERE, SMALL)
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\((.*?)\).*?mask_type\\22: \\22(\w+)", text)
    assert sorted(mask for back, _, mask in calls if not back) == ["CAUSAL", "CAUSAL", "PADDING"]
    backward = {mask + str(n): args.split(", ") for n, (back, args, mask) in enumerate(calls) if back}
    (own, shared) = ([v for k, v in backward.items() if k.startswith(mask)] for mask in ("CAUSAL", "PADDING"))
    assert (len(own), len(shared)) == (2, 1)
    # q, k, v, lse, dO, O: both parts of a completion are handed the same last three, those of the merged softmax.
    assert sum(args[3:6] == shared[0][3:6] for args in own) == 1


def test_a_tpu_runs_splash_on_prompt_and_both_parts_of_a_completion(monkeypatch):
    names = re.findall(r"splash_mha_(\w+?)_(segmented_)?(?:no_)?residuals", lowered(monkeypatch, TPU, SMALL))
    assert sorted(names) == sorted((name, part) for name in ("dkv", "dq", "fwd") for part in ("", "", "segmented_"))


@pytest.mark.parametrize(("where", "spec"), [(HOPPER, TINY_GEMMA2), (TPU, TINY_GEMMA3)])
def test_auto_leaves_to_xla_what_a_kernel_cannot_do(monkeypatch, where, spec):
    text = lowered(monkeypatch, where, dataclasses.replace(spec, vocab_size=40))
    assert "dot_general" in text
    assert not re.search(r"__cudnn|splash|tpu_custom_call", text)


PLAIN = Layer("bfloat16", 128)


@pytest.mark.parametrize(
    ("backend", "where", "layer", "need"),
    [
        ("xla", CPU, PLAIN, None),
        ("xla", HOPPER, Layer("float32", 20, 50.0, True), None),
        ("cudnn", AMPERE, PLAIN, None),
        ("cudnn", HOPPER, Layer("bfloat16", 256), None),
        ("cudnn", CPU, PLAIN, "NVIDIA GPU"),
        ("cudnn", Machine("gpu"), PLAIN, "NVIDIA GPU"),
        ("cudnn", AMPERE, Layer("float32", 128), "model.dtype bfloat16"),
        ("cudnn", AMPERE, Layer("bfloat16", 256), "at most 128"),
        ("cudnn", HOPPER, Layer("bfloat16", 264), "at most 256"),
        ("cudnn", HOPPER, Layer("bfloat16", 20), "multiple of 8"),
        ("cudnn", HOPPER, Layer("bfloat16", 64, softcap=50.0), "cap"),
        ("cudnn", HOPPER, Layer("bfloat16", 64, windowed=True), "windows"),
        ("splash", TPU, Layer("float32", 64, softcap=50.0), None),
        ("splash", HOPPER, PLAIN, "TPU"),
        ("splash", TPU, Layer("bfloat16", 64, windowed=True), "windows"),
    ],
)
def test_a_kernel_that_is_named_and_cannot_do_the_layer_is_refused(backend, where, layer, need):
    if need is None:
        assert obstacle(backend, where, layer) is None
        assert chosen(backend, where, layer) == backend
    else:
        with pytest.raises(ConfigError, match=rf"model\.attention: wanted .*{need}.* for {backend}, got .*Use auto"):
            chosen(backend, where, layer)
        assert chosen("auto", where, layer) in ("xla", backends.NATIVE.get(where.platform))


def test_this_machine_is_described_as_jax_sees_it(monkeypatch):
    assert backends.machine().platform == jax.default_backend()

    def machine_with(capability):
        monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": capability})])
        return backends.machine().capability

    assert machine_with("8.6") == (8, 6)
    assert machine_with("12.0") == (12, 0)
    assert machine_with("gfx942") == ()


def test_merged_part_of_one_set_is_that_part():
    q, _, _, k, v = draw(2, 1, 2, 2, 1, 9, 9, 4)
    part = Part(*textbook_forward(q[:, 0], backends.Keys(k, v, None), Scoring(1.0)))
    out = backends.fused_attention(TEXTBOOK, Scoring(1.0), q[:, 0], (backends.Keys(k, v, None),))
    np.testing.assert_allclose(out, part.out, rtol=1e-6)
