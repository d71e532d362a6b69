"""A Hugging Face checkpoint as a directory that training reads; the same as ``kardia import``.

python convert/from_hf.py Qwen/Qwen2.5-0.5B-Instruct models/qwen2.5-0.5b --dtype bfloat16
"""

import sys

from kardia_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
