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

import dataclasses
import pathlib

from kardia_jax.config import Config, LoraConfig, MeshConfig, load_config


def get_config() -> Config:
    """A base in bfloat16 under adapters of rank 16 on every linear layer; one group of 8 at a time in the update."""
    config = load_config(pathlib.Path(__file__).with_name("kardia_qwen2_5_7b.py"))
    model = dataclasses.replace(config.model, lora=LoraConfig(rank=16, alpha=32.0, base="bfloat16"))
    optimizer = dataclasses.replace(config.grpo.optimizer, learning_rate=1e-5)
    grpo = dataclasses.replace(config.grpo, micro_batches=4, optimizer=optimizer)
    return dataclasses.replace(config, mesh=MeshConfig(), model=model, grpo=grpo)
