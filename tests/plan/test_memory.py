"""Bytes per device, by hand."""

import dataclasses

import pytest

from kardia_jax.config import (
    Config,
    DataConfig,
    GrpoConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
)
from kardia_jax.model.policy import Compute
from kardia_jax.model.shapes import SHAPES
from kardia_jax.plan.memory import activation_bytes, head_bytes, memory, shape_of

COMPUTE = Compute("bfloat16", head_chunk=64)
# tiny-llama: 2 layers of kernels 64 x (4 + 2 + 2 + 4) x 16 + 3 x 64 x 192, two tables of 3200 x 64, 5 norms of 64.
KERNELS, TABLES, NORMS = 2 * (12_288 + 36_864), 2 * 3200 * 64, 5 * 64
COUNTERS = 3 * 4
"""AdamW's, its schedule's and that of weight decay's mask: one integer each, if optax keeps it."""


def tiny(**grpo) -> Config:
    settings = {"prompts": 4, "group": 8, "sampler": SamplerConfig(temperature=1.0, max_new_tokens=64)} | grpo
    return Config(
        data=DataConfig(max_prompt_tokens=128), model=ModelConfig(source="tiny-llama"), grpo=GrpoConfig(**settings)
    )


def held(config, sizes=(2, 2, 2), fused=True, compute=COMPUTE):
    return memory(SHAPES["tiny-llama"], config, compute, sizes, fused)


def test_bytes_on_2x2x2_by_hand():
    got = held(tiny())
    # fsdp and tensor each halve kernels and tables; norms lie whole everywhere; data shares nothing out.
    assert got.parameters == 4 * ((KERNELS + TABLES) // 4 + NORMS)
    assert got.gradients == 2 * got.parameters
    assert got.reference == got.parameters
    assert 0 <= got.moments - 2 * got.parameters <= COUNTERS
    # The sampler's copy: bfloat16, gathered over fsdp.
    assert got.sampler_weights == 2 * ((KERNELS + TABLES) // 2 + NORMS)
    # One group and one of two kv heads a device: 2 layers x (key, value) x 16 numbers x (128 + 8 x 64) places.
    assert got.kv == 2 * 2 * 16 * 2 * (128 + 8 * 64)
    assert got.resident == got.parameters + got.moments + got.reference
    assert got.update_peak == got.resident + got.gradients + got.activations


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2), (1, 4, 4), (2, 2, 2)])
def test_parameters_and_moments_are_what_12_bytes_a_parameter_make(sizes):
    spec = SHAPES["qwen2.5-7b"]
    config = Config(model=ModelConfig(source="qwen2.5-7b"), grpo=GrpoConfig(prompts=8))
    got = memory(spec, config, COMPUTE, sizes, True)
    assert got.parameters + got.moments == pytest.approx(12 * spec.parameter_count / (sizes[1] * sizes[2]), rel=0.01)


def test_what_lies_in_host_memory_costs_the_device_nothing():
    away = held(tiny(optimizer=OptimizerConfig(offload=True), offload_reference=True))
    assert (away.moments, away.reference) == (0, 0)
    narrow = held(tiny(optimizer=OptimizerConfig(moment_dtype="bfloat16")))
    assert held(tiny()).moments - narrow.moments == narrow.parameters // 2
    assert held(tiny(loss=LossConfig(beta=0.0))).reference == 0
    int8 = SamplerConfig(temperature=1.0, max_new_tokens=64, kv_dtype="int8")
    assert held(tiny(sampler=int8)).kv == held(tiny()).kv * (16 + 4) // 32


def test_an_adapter_trains_its_own_parameters_over_a_frozen_base():
    lora = LoraConfig(rank=4, targets=("q_proj",), base="bfloat16")
    config = dataclasses.replace(tiny(), model=ModelConfig(source="tiny-llama", lora=lora))
    got = held(config, (1, 1, 1))
    assert got.frozen == 2 * (KERNELS + TABLES + NORMS)
    assert got.parameters == 4 * 2 * (64 * 4 + 4 * 64)
    assert got.reference == 0


def test_the_shape_of_a_step_is_padded_as_the_sampler_pads():
    shape = shape_of(tiny(sampler=SamplerConfig(temperature=1.0, max_new_tokens=100, rows=16)), 4)
    assert (shape.prompt, shape.completion, shape.columns) == (128, 100, 128)
    assert shape.seated == 4, "16 rows are two groups, and every device that shares rows has as many seats"
    by_tokens = shape_of(tiny(tokens_per_micro_batch=2 * (128 + 8 * 64)), 1)
    assert (by_tokens.tokens, by_tokens.micro) == (640, 2)
    budget = tiny(prompts=16, tokens_per_micro_batch=2 * (128 + 8 * 64))
    assert shape_of(budget, 4).micro == 8, "the budget is that of one device"
    assert shape_of(tiny(tokens_per_micro_batch=1), 4).micro == 4, "one group on each device that shares rows"


def test_activations_grow_with_what_the_backward_pass_keeps():
    spec, shape = SHAPES["tiny-llama"], shape_of(tiny(), 1)

    def of(remat, fused=True):
        return activation_bytes(spec, dataclasses.replace(COMPUTE, remat=remat), shape, 2, (1, 1, 1), fused)

    tokens = 4 * (128 + 8 * 64)
    # Beside the stream, dots keeps per token q, k, v (8 x 16), what they attended to (4 x 16), o (64), gate and up
    # (2 x 192), in bfloat16, in 2 layers.
    assert of("dots") - of("block") == 2 * tokens * 2 * (128 + 64 + 64 + 384)
    assert of("block") < of("dots") < of("none")
    assert of("block", fused=False) > of("block")


def test_the_head_holds_a_slice_of_logits_and_its_table_twice():
    spec, rest = SHAPES["tiny-llama"], 2 * 100 * 64 * 2
    assert head_bytes(spec, COMPUTE, 100, 2) == 3 * 64 * 1600 * 4 + 1600 * 64 * (2 + 4) + rest
    by_rows = dataclasses.replace(COMPUTE, vocab_chunk=128)
    assert head_bytes(spec, by_rows, 100, 2) == 3 * 64 * 128 * 4 + 1600 * 64 * (2 + 4) + rest
