"""``python -m kardia_jax`` is ``kardia``."""

import sys

from kardia_jax.cli import main

sys.exit(main())
