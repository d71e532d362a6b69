"""Train empathetic language models with a rubric for a judge: SFT and group-shared GRPO in JAX."""

__version__ = "0.1.0"
