"""Everything a run can be told; see ``tree``."""

from kardia_jax.config.bench import BenchConfig, ImportBenchConfig
from kardia_jax.config.errors import ConfigError
from kardia_jax.config.judge import JudgeConfig
from kardia_jax.config.lora import FULL, LoraConfig
from kardia_jax.config.mesh import MeshConfig
from kardia_jax.config.objective import AdvantageConfig, LossConfig
from kardia_jax.config.tree import (
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    flat,
    from_json,
    to_json,
)

__all__ = [
    "FULL",
    "AdvantageConfig",
    "BenchConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GrpoConfig",
    "ImportBenchConfig",
    "JudgeConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "SftConfig",
    "flat",
    "from_json",
    "to_json",
]
