"""The compiled programs that the command line keeps between runs: what was compiled once on this machine is loaded.

JAX's persistent cache, in a folder of the user's. Each entry is found by the program, the versions and the device, so a
stale one is never used and the folder may be deleted at any time. Programs for a CPU hold its own instructions, which
another CPU may lack, so machines that share a home directory have folders of their own.
"""

import hashlib
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Mapping

import jax

LEAST_SECONDS = 0.2
"""Programs that compile faster are not kept: there are hundreds of them, and most are operations outside a step."""
OWN_FOLDER = "JAX_COMPILATION_CACHE_DIR"
OWN_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def use_compilation_cache(setting: str) -> None:
    """Turns the cache on as ``run.compilation_cache`` says, before anything is compiled, and says where it is.

    A folder that cannot be written is a line on stderr; the run goes on and compiles.
    """
    if setting == "off" or not jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = cache_folder(setting, os.environ)
    problem = _problem(folder)
    if problem:
        jax.config.update("jax_enable_compilation_cache", False)
        fix = "Everything is compiled anew; name another folder, or `off`."
        print(f"run.compilation_cache: wanted a folder to write, got {folder}: {problem}. {fix}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    if OWN_LEAST not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    print(f"compiled programs are kept in {folder}")


def cache_folder(setting: str, environment: Mapping[str, str]) -> str:
    """The folder (or bucket) that a setting other than ``off`` means."""
    if setting != "auto":
        return os.path.expanduser(setting)
    own = environment.get(OWN_FOLDER)
    home = pathlib.Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return own or str(home / "kardia_jax" / "programs" / this_cpu())


def this_cpu() -> str:
    """Architecture and a hash of the CPU's name and instruction sets, like ``x86_64-1f2e3d4c``."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = ("model name", "flags", "Features", "CPU part")
    facts = sorted({line for line in lines if line.split(":")[0].strip() in named}) or [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:8]}"


def _problem(folder: str) -> str:
    """Why nothing can be written there; empty where something can, and for a bucket, which JAX reaches by itself."""
    if "://" in folder:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
