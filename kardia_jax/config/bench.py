"""What is measured: the workload of ``kardia bench``."""

import pathlib
from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require
from kardia_jax.config.objective import LossConfig
from kardia_jax.config.tree import ModelConfig, SamplerConfig


@dataclass(frozen=True)
class BenchConfig:
    """A step of GRPO, or a part of it, on random token ids of fixed lengths."""

    model: str = "qwen2.5-0.5b"
    """A built-in shape with random parameters (`kardia doctor` lists them), a Hugging Face directory or a GGUF file."""
    prompts: int = 2
    """Prompts (P)."""
    group: int = 8
    """Completions per prompt (G)."""
    prompt_len: int = 512
    """Tokens of every prompt (S), padded as in training."""
    new_tokens: int = 128
    """Tokens of every completion (T); none ends earlier."""
    beta: float = LossConfig.beta
    """Weight of the KL; above 0 a copy of the model is the reference and scores the completions. Unused by sample."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute type; auto is bfloat16 on accelerators and float32 on CPU. Masters are float32; sample needs none and
    keeps the parameters in this type."""
    steps: int = 3
    """Measured repetitions, after one that compiles; medians are reported."""
    micro_batches: int = 1
    """Slices of the batch whose gradients are added before the update."""
    remat: Literal["none", "block", "dots"] = ModelConfig.remat
    """See model.remat."""
    head_chunk: int = ModelConfig.head_chunk
    """See model.head_chunk."""
    vocab_chunk: int = ModelConfig.vocab_chunk
    """See model.vocab_chunk."""
    unroll: int = ModelConfig.unroll
    """See model.unroll."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = ModelConfig.attention
    """See model.attention."""
    kv_dtype: Literal["compute", "bfloat16", "int8"] = SamplerConfig.kv_dtype
    """See sampler.kv_dtype."""
    weights_dtype: Literal["compute", "int8"] = SamplerConfig.weights_dtype
    """See sampler.weights_dtype."""
    rows: int = SamplerConfig.rows
    """See sampler.rows."""
    seed: int = 0
    """Of parameters, prompts, draws and advantages."""
    json: bool = False
    """Print the JSON line alone; it is the last line either way."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "prompt_len", "steps", "unroll"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.new_tokens >= 2, "new_tokens", "at least 2: the first comes from the prompt", self.new_tokens)
        require(self.head_chunk >= 1, "head_chunk", "at least 1", self.head_chunk)
        require(self.vocab_chunk >= 0, "vocab_chunk", "0 (chosen by platform) or more", self.vocab_chunk)
        require(self.rows >= 0, "rows", "0 (all) or more", self.rows)
        require(self.beta >= 0, "beta", "0 (no reference) or more", self.beta)
        require(0 <= self.seed < 2**31, "seed", "an integer in [0, 2^31)", self.seed)
        divides = self.micro_batches >= 1 and self.prompts % self.micro_batches == 0
        fix = f"Pick a divisor of prompts = {self.prompts}."
        require(divides, "micro_batches", "a divisor of prompts", self.micro_batches, fix)


@dataclass(frozen=True)
class ImportBenchConfig:
    """Conversion of a synthetic bfloat16 checkpoint of a built-in shape, each way in a process of its own."""

    model: str = "qwen2.5-0.5b"
    """A built-in shape (`kardia doctor` lists them)."""
    folder: pathlib.Path = pathlib.Path("runs/bench-import")
    """Folder for the checkpoint and its copy, removed afterwards: 4 bytes per parameter are needed."""
    json: bool = False
    """Print the JSON line alone; it is the last line either way."""
