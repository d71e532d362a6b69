"""Built-in shapes: random models for tests, the demo and benchmarks. Sizes of qwen2.5-* and gemma-* are published."""

import dataclasses

from kardia_jax.model.rope import RopeSpec
from kardia_jax.model.spec import ModelSpec, SpecError

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

TINY_GEMMA2 = dataclasses.replace(
    TINY,
    family="gemma2",
    query_scalar=20,
    attention_softcap=50.0,
    final_softcap=30.0,
    window=32,
    layer_types=("sliding_attention", "full_attention"),
)

TINY_GEMMA3 = dataclasses.replace(
    TINY,
    family="gemma3_text",
    layers=3,
    kv_heads=1,
    rope=RopeSpec(theta=1_000_000.0, kind="linear", factor=8.0),
    local_rope=RopeSpec(),
    window=32,
    layer_types=("sliding_attention", "sliding_attention", "full_attention"),
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

QWEN25_14B = dataclasses.replace(QWEN25_7B, width=5120, mlp_width=13_824, layers=48, heads=40, kv_heads=8)

GEMMA_7B = ModelSpec(
    family="gemma",
    vocab_size=256_000,
    width=3072,
    mlp_width=24_576,
    layers=28,
    heads=16,
    kv_heads=16,
    head_dim=256,
    max_positions=8192,
)

SHAPES: dict[str, ModelSpec] = {
    "tiny-qwen2": TINY,
    "tiny-qwen3": dataclasses.replace(TINY, family="qwen3"),
    "tiny-llama": dataclasses.replace(TINY, family="llama", tied=False),
    "tiny-gemma": dataclasses.replace(TINY, family="gemma", kv_heads=1, head_dim=32),
    "tiny-gemma2": TINY_GEMMA2,
    "tiny-gemma3": TINY_GEMMA3,
    "demo-qwen3": dataclasses.replace(TINY, family="qwen3", width=128, mlp_width=384, head_dim=32),
    "qwen2.5-0.5b": dataclasses.replace(QWEN25_3B, width=896, mlp_width=4864, layers=24, heads=14, head_dim=64),
    "qwen2.5-1.5b": dataclasses.replace(QWEN25_3B, width=1536, mlp_width=8960, layers=28, heads=12),
    "qwen2.5-3b": QWEN25_3B,
    "qwen2.5-7b": QWEN25_7B,
    "qwen2.5-14b": QWEN25_14B,
    "gemma-2b": dataclasses.replace(GEMMA_7B, width=2048, mlp_width=16_384, layers=18, heads=8, kv_heads=1),
    "gemma-7b": GEMMA_7B,
}


def named_shape(name: str) -> ModelSpec:
    """The built-in shape of that name; SpecError lists the names."""
    if name not in SHAPES:
        raise SpecError(f"model.source: wanted a local directory or one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]
