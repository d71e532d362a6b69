"""Whole steps of GRPO: TRL and kardia_jax in turns.

    python benchmarks/vs_trl.py --model models/smollm2 --rounds 3
    python benchmarks/vs_trl.py --prompts 1 --group 2 --prompt-len 32 --new-tokens 8 --steps 1 --weights bfloat16

TRL needs 23 GB at the default lengths. Its environment takes the release of PyTorch that the tests are pinned to.
"""

from versus import Peer, main

TRL = Peer("trl", "trl_grpo.py", "step", ("torch==2.13.0", "trl==1.16.0 accelerate"))

if __name__ == "__main__":
    main(TRL, __doc__)
