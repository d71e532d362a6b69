"""A run's newest checkpoint, or a model directory, as a Hugging Face directory; the same as ``kardia export``.

python convert/to_hf.py runs/a-grpo out/my-kardia --dtype bfloat16 --max-shard-size 2GB
"""

import sys

from kardia_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
