"""Whole steps of GRPO: Tunix and kardia_jax in turns. Llama and Qwen2 checkpoints.

python benchmarks/vs_tunix.py --model models/smollm2 --prompts 4 --group 4 --rounds 3
"""

from versus import Peer, main

TUNIX = Peer("tunix", "tunix_grpo.py", "step", ("google-tunix==0.1.7 jax==0.10.2 flax==0.12.8",))

if __name__ == "__main__":
    main(TUNIX, __doc__)
