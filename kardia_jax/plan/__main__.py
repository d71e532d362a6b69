"""The planning process: a request on stdin, one line of JSON on stdout. See ``run.py``."""

import sys

from kardia_jax.plan.run import answer

if __name__ == "__main__":
    print(answer(sys.stdin.read()))
