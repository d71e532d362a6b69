"""Kardia-R1 on Qwen2.5-3B, every parameter trained: the smaller of the paper's two Qwen backbones.

    kardia import Qwen/Qwen2.5-3B-Instruct models/qwen2.5-3b --dtype bfloat16
    kardia sft  configs/kardia_qwen2_5_3b.py --run.dir runs/sft
    kardia grpo configs/kardia_qwen2_5_3b.py --run.dir runs/grpo --model.source runs/sft/hf

Hardware: 8 GPUs of 40 GB or more with the mesh below; on 16 x v5e or v6e set ``--mesh.tensor 4``.
What the paper fixes and what is assumed stands in ``kardia_qwen2_5_7b.py``; only the model differs.
"""

import dataclasses
import pathlib

from kardia_jax.config import Config, load_config


def get_config() -> Config:
    """The 7B recipe on the smaller model."""
    config = load_config(pathlib.Path(__file__).with_name("kardia_qwen2_5_7b.py"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, source="models/qwen2.5-3b"))
