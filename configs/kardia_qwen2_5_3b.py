"""Kardia-R1 on Qwen2.5-3B, every parameter trained: the smaller of the paper's two Qwen backbones.

    kardia import Qwen/Qwen2.5-3B-Instruct models/qwen2.5-3b --dtype bfloat16
    kardia sft  configs/kardia_qwen2_5_3b.py --run.dir runs/sft
    kardia grpo configs/kardia_qwen2_5_3b.py --run.dir runs/grpo --model.source runs/sft/hf

Hardware: 8 GPUs of 40 GB or more with the mesh below; on 16 x v5e or v6e set ``--mesh.tensor 4``.
What the paper fixes and what is assumed stands in ``kardia_qwen2_5_7b.py``; only the model differs.
"""

import dataclasses
import importlib.util
import pathlib

from kardia_jax.config import Config


def get_config() -> Config:
    """The 7B recipe on the smaller model."""
    beside = pathlib.Path(__file__).with_name("kardia_qwen2_5_7b.py")
    spec = importlib.util.spec_from_file_location("kardia_qwen2_5_7b", beside)
    assert spec is not None, beside
    assert spec.loader is not None, beside
    larger = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(larger)
    config: Config = larger.get_config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, source="models/qwen2.5-3b"))
