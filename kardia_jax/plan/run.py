"""A plan from a config: in a process of its own, since devices are simulated when JAX starts.

    found = plan(config, devices=16, chip=None, topology="v5e:4x4")     # one object, as --json prints it

The process that asks keeps its own devices and allocates nothing. The other one (``python -m kardia_jax.plan``) reads
the request on stdin and answers with one line of JSON on stdout: the plan, or what was wrong.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

from kardia_jax import chips
from kardia_jax.config import Config, ConfigError, from_json, to_json
from kardia_jax.config.mesh import AXES


class PlanError(ValueError):
    """A plan that cannot be made: what was wanted, what came and what to do, as the planning process said it."""


INSTALL = "pip install 'kardia_jax[plan]'"


def plan(config: Config, devices: int | None, chip: str | None, topology: str | None) -> dict[str, Any]:
    """Compiles the step for the mesh and says what it needs.

    Raises ConfigError for a mesh that does not divide devices, model or batch, for an unknown chip or slice, and for a
    slice without libtpu.
    """
    if config.mesh.sampler.devices:
        fix = "Plan the two apart, each as the mesh: the learner's devices, then the sampler's."
        raise ConfigError("mesh.sampler", "no devices of its own in a plan", config.mesh.sampler.sizes, fix)
    named = None if chip is None else chips.chip(chip)
    of = None if topology is None else chips.check_topology(topology)
    if of is not None and importlib.util.find_spec("libtpu") is None:
        raise ConfigError("topology", "libtpu, which compiles for TPUs", "none", f"Install it: {INSTALL}")
    if of is not None and named is not None and of != named:
        raise ConfigError("chip", f"{of.name} with topology {topology}", named.name, "Leave one of them out.")
    count = devices_of(config, devices, topology)
    config.mesh.sizes(count)
    request = {"config": json.loads(to_json(config)), "devices": count, "chip": chip, "topology": topology}
    answer = subprocess.run(
        [sys.executable, "-m", "kardia_jax.plan"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(count, topology),
        check=False,
    )
    if answer.returncode:
        raise PlanError(
            f"plan: wanted an answer of the planning process, got exit code {answer.returncode}; see above."
        )
    found = json.loads(answer.stdout.splitlines()[-1])
    if "error" in found:
        raise PlanError(found["error"])
    return found


def devices_of(config: Config, devices: int | None, topology: str | None) -> int:
    """How many devices: of the slice, as asked for, or as the mesh says.

    Raises ConfigError where they contradict each other or nobody says.
    """
    sizes = [getattr(config.mesh, name) for name in AXES]
    slice_ = None if topology is None else math.prod(map(int, topology.split(":")[1].split("x")))
    if devices is not None and devices < 1:
        raise ConfigError("devices", "at least 1", devices)
    if None not in (devices, slice_) and devices != slice_:
        raise ConfigError("devices", f"{slice_}, the chips of {topology}", devices, "Leave it out.")
    count = devices or slice_
    if count is None and -1 in sizes:
        raise ConfigError("devices", "a number, since the mesh leaves one open", None, "Add --devices N.")
    return math.prod(sizes) if count is None else count


def environment(devices: int, topology: str | None) -> dict[str, str]:
    """Of the planning process: CPU devices alone; libtpu is told not to look for a machine around it."""
    names = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(1 if topology else devices),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_LOG_DIR": "disabled",
        # Compiling touches no TPU, so several processes may do it at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    # What the asking process runs on says nothing here; a flag for its GPU would be refused by a build without one.
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | names


def answer(text: str) -> str:
    """What the planning process prints for a request."""
    from kardia_jax.plan.make import make_plan

    request = json.loads(text)
    config = from_json(json.dumps(request["config"]))
    try:
        found = make_plan(config, request["devices"], request["chip"], request["topology"])
    except ValueError as error:
        if not type(error).__module__.startswith("kardia_jax"):
            raise
        return json.dumps({"error": str(error)})
    return json.dumps(found)
