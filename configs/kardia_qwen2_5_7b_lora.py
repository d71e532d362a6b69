"""Kardia-R1 on Qwen2.5-7B with a low-rank adapter, on one GPU of 80 GB.

    kardia import Qwen/Qwen2.5-7B-Instruct models/qwen2.5-7b --dtype bfloat16
    kardia sft  configs/kardia_qwen2_5_7b.py --run.dir runs/sft          # the span tags are new: see below
    kardia grpo configs/kardia_qwen2_5_7b_lora.py --run.dir runs/lora --model.source runs/sft/hf

Hardware: one H100 or A100 with 80 GB.

    kardia plan configs/kardia_qwen2_5_7b_lora.py --chip h100

The paper does not say whether it trains adapters; rank, alpha, targets and the adapter's learning rate here are
assumptions (arXiv 2106.09685 for the method; a rate ten times that of full training is common). An adapter trains no
embeddings, so it cannot learn the eight span tags: start from a model that has been through SFT as a whole, or from the
released Kardia-R1. Everything else is that of ``kardia_qwen2_5_7b.py``: batch 32 as 4 prompts x 8, two epochs,
ms-swift's defaults. The reference of the KL term is the frozen base, which costs no memory.
"""

from kardia_jax.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    GrpoConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
)


def get_config() -> Config:
    """A base in bfloat16 under adapters of rank 16 on every linear layer; one group of 8 at a time in the update."""
    return Config(
        data=DataConfig(source="Jhcircle/KardiaBench", max_prompt_tokens=1024),
        model=ModelConfig(
            source="models/qwen2.5-7b",
            dtype="bfloat16",
            remat="block",
            lora=LoraConfig(rank=16, alpha=32.0, base="bfloat16"),
        ),
        grpo=GrpoConfig(
            epochs=2.0,
            prompts=4,
            group=8,
            micro_batches=4,
            sampler=SamplerConfig(temperature=0.9, max_new_tokens=512),
            advantage=AdvantageConfig(scale="group"),
            loss=LossConfig(name="grpo", beta=0.04, clip_low=0.2, clip_high=0.2),
            optimizer=OptimizerConfig(
                learning_rate=1e-5, weight_decay=0.1, beta2=0.95, schedule="cosine", clip_norm=1.0
            ),
        ),
    )
