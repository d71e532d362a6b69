"""Built-in shapes: random models for tests, the demo and benchmarks. Sizes of qwen2.5-* are the published ones."""

import dataclasses

from kardia_jax.model.spec import ModelSpec, RopeSpec, SpecError

TINY = ModelSpec(
    family="qwen2",
    vocab_size=3200,
    width=64,
    mlp_width=192,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    max_positions=2048,
)

QWEN25_7B = ModelSpec(
    family="qwen2",
    vocab_size=152_064,
    width=3584,
    mlp_width=18_944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    tied=False,
    rope=RopeSpec(theta=1_000_000.0),
    token_count=151_665,
)

QWEN25_3B = dataclasses.replace(
    QWEN25_7B, vocab_size=151_936, width=2048, mlp_width=11_008, layers=36, heads=16, kv_heads=2, tied=True
)

SHAPES: dict[str, ModelSpec] = {
    "tiny-qwen2": TINY,
    "tiny-qwen3": dataclasses.replace(TINY, family="qwen3"),
    "demo-qwen3": dataclasses.replace(TINY, family="qwen3", width=128, mlp_width=384, head_dim=32),
    "qwen2.5-0.5b": dataclasses.replace(QWEN25_3B, width=896, mlp_width=4864, layers=24, heads=14, head_dim=64),
    "qwen2.5-1.5b": dataclasses.replace(QWEN25_3B, width=1536, mlp_width=8960, layers=28, heads=12),
    "qwen2.5-3b": QWEN25_3B,
    "qwen2.5-7b": QWEN25_7B,
}


def named_shape(name: str) -> ModelSpec:
    """The built-in shape of that name; SpecError lists the names."""
    if name not in SHAPES:
        raise SpecError(f"model.source: wanted a local directory or one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]
