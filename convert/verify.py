"""Are two checkpoints the same model, and does ours compute what transformers does; the same as ``kardia verify``.

python convert/verify.py models/qwen2.5-0.5b out/qwen2.5-0.5b --json
python convert/verify.py models/qwen2.5-0.5b --against transformers
"""

import sys

from kardia_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
