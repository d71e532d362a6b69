"""Train empathetic language models with a rubric for a judge: SFT and group-shared GRPO in JAX.

    policy = kardia_jax.load("models/smollm2", dtype="float32")        # parameters, spec, tokenizer
    kardia_jax.logits(policy, tokens, lengths)                         # [B, S, V]
    kardia_jax.generate(policy, ["I failed my exam."], n=2)
    kardia_jax.save(policy, "out/smollm2")

Importing the package is quick; JAX and transformers are imported when one of these is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kardia_jax.pretrained import Completion as Completion
    from kardia_jax.pretrained import Pretrained as Pretrained
    from kardia_jax.pretrained import generate as generate
    from kardia_jax.pretrained import load as load
    from kardia_jax.pretrained import logits as logits
    from kardia_jax.pretrained import save as save

__version__ = "0.1.0"

PUBLIC = ("Completion", "Pretrained", "generate", "load", "logits", "save")


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kardia_jax import pretrained

    return vars(pretrained)[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
