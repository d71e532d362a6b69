"""Which kinds of device JAX looks for, where nobody has said.

With libtpu installed (extra ``plan``: it compiles for TPUs on any machine) JAX tries to start a TPU wherever it runs,
and libtpu says at length on stderr that there is none.
"""

import glob
import importlib.util
import os

TPUS = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Device nodes of TPUs; others' show up under the second one too, and are left to JAX."""
GPUS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")


def leave_out_absent_tpus() -> None:
    """Restricts JAX, which is not imported yet, to the CPU where libtpu is installed and no accelerator is there.

    What JAX_PLATFORMS or JAX_FORCE_TPU_INIT say stands.
    """
    asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_FORCE_TPU_INIT")
    if not asked and importlib.util.find_spec("libtpu") is not None and not any(map(glob.glob, TPUS + GPUS)):
        os.environ["JAX_PLATFORMS"] = "cpu"
