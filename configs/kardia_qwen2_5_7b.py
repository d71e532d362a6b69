"""Kardia-R1 on Qwen2.5-7B, every parameter trained.

    kardia import Qwen/Qwen2.5-7B-Instruct models/qwen2.5-7b --dtype bfloat16
    kardia sft  configs/kardia_qwen2_5_7b.py --run.dir runs/sft
    kardia grpo configs/kardia_qwen2_5_7b.py --run.dir runs/grpo --model.source runs/sft/hf

Hardware: 8 x A100-80 as in the paper, or 8 x H100, with the mesh below (fsdp 4 x tensor 2). On 16 x v5e or v6e set
``--mesh.tensor 4``. Whether it fits is asked before anything is bought:

    kardia plan configs/kardia_qwen2_5_7b.py --chip a100-80
    kardia plan configs/kardia_qwen2_5_7b.py --mesh.tensor 4 --topology v5e:4x4

The paper (arXiv 2512.01282) fixes: AdamW, 2 epochs each, batch 128 at 1e-4 for SFT and batch 32 with groups of 8 at
1e-6 for GRPO, three rewards of equal weight, 8 x A100. It is silent on what follows; these are the defaults of
ms-swift, its framework, at the time: beta 0.04, clip range 0.2, temperature 0.9, 512 new tokens, sequence-mean loss,
division by the group's std, weight decay 0.1, beta2 0.95, cosine, clipping at 1.0. That a batch of 32 counts
completions, 4 prompts x 8, is our reading. Mesh and remat change no result beyond rounding.
"""

from kardia_jax.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    GrpoConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SftConfig,
)


def get_config() -> Config:
    """One prompt with its 8 completions lies on the two devices of a tensor pair: 4 prompts, 8 devices."""
    return Config(
        data=DataConfig(source="Jhcircle/KardiaBench", max_prompt_tokens=1024),
        model=ModelConfig(source="models/qwen2.5-7b", dtype="bfloat16", remat="block"),
        mesh=MeshConfig(fsdp=4, tensor=2),
        sft=SftConfig(
            epochs=2.0,
            batch=128,
            micro_batches=32,
            optimizer=OptimizerConfig(
                learning_rate=1e-4, weight_decay=0.1, beta2=0.95, schedule="cosine", clip_norm=1.0
            ),
        ),
        grpo=GrpoConfig(
            epochs=2.0,
            prompts=4,
            group=8,
            sampler=SamplerConfig(temperature=0.9, max_new_tokens=512),
            advantage=AdvantageConfig(scale="group"),
            loss=LossConfig(name="grpo", beta=0.04, clip_low=0.2, clip_high=0.2),
            optimizer=OptimizerConfig(
                learning_rate=1e-6, weight_decay=0.1, beta2=0.95, schedule="cosine", clip_norm=1.0
            ),
        ),
    )
