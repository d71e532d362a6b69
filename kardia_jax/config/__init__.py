"""Everything a run can be told; see ``tree``."""

from kardia_jax.config.alarms import AlarmConfig
from kardia_jax.config.bench import BenchConfig, ImportBenchConfig
from kardia_jax.config.errors import ConfigError
from kardia_jax.config.files import load_config
from kardia_jax.config.hosts import HostsConfig
from kardia_jax.config.judge import (
    AuditConfig,
    CacheConfig,
    EndpointConfig,
    JudgeConfig,
    JudgeSamplingConfig,
    RemoteConfig,
    ReplayConfig,
    TrafficConfig,
)
from kardia_jax.config.local_judge import LocalJudgeConfig
from kardia_jax.config.lora import FULL, LoraConfig
from kardia_jax.config.mesh import MeshConfig, SamplerMeshConfig
from kardia_jax.config.objective import AdvantageConfig, LossConfig
from kardia_jax.config.saved import flat, from_json, to_json
from kardia_jax.config.serve import ServeConfig
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
)

__all__ = [
    "FULL",
    "AdvantageConfig",
    "AlarmConfig",
    "AuditConfig",
    "BenchConfig",
    "CacheConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "GrpoConfig",
    "HostsConfig",
    "ImportBenchConfig",
    "JudgeConfig",
    "JudgeSamplingConfig",
    "LocalJudgeConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RemoteConfig",
    "ReplayConfig",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "SamplerMeshConfig",
    "ServeConfig",
    "SftConfig",
    "TrafficConfig",
    "flat",
    "from_json",
    "load_config",
    "to_json",
]
