"""The whole path on a laptop: `make demo`, or

    kardia demo configs/demo.py --seeds 3

A 0.8 M parameter Qwen3 from random weights, the shipped synthetic dialogues, the embedded rule judge. No accelerator.
"""

import pathlib

from kardia_jax.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
)

TOKENS = 96
"""The longest answer of the mini set has 86 tokens."""


def get_config() -> Config:
    """Settings found by trial on 2 cores; nothing here is the paper's."""
    return Config(
        run=RunConfig(dir=pathlib.Path("runs/demo"), save_every=100),
        # A model without pre-training cannot follow instructions: the built-in prompt would cost half of the time.
        data=DataConfig(system_prompt=pathlib.Path(__file__).with_name("demo_system_prompt.txt")),
        model=ModelConfig(source="demo-qwen3", remat="none", head_chunk=256),
        sft=SftConfig(
            epochs=1.0,
            batch=4,
            optimizer=OptimizerConfig(learning_rate=1e-2, final_share=0.05),
        ),
        grpo=GrpoConfig(
            steps=40,
            prompts=8,
            group=8,
            sampler=SamplerConfig(temperature=1.0, max_new_tokens=TOKENS),
            advantage=AdvantageConfig(scale="group"),
            loss=LossConfig(name="dapo", beta=0.0),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0),
        ),
        eval=EvalConfig(sampler=SamplerConfig(temperature=0.0, max_new_tokens=TOKENS), batch=64, turns="last"),
    )
