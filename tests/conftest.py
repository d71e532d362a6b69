"""What every test runs on: eight CPU devices, so that sharding code shards (the first one, unless a test makes a mesh),
and no network.

Environment variables, set before anything reads them: importing jax or transformers here would slow down every test
run that needs neither.
"""

import contextlib
import gc
import os
import resource
import signal
import sys
import tempfile

import pytest
from hypothesis import settings

pytest_plugins = ["chat_server"]

# No time limit for an example: its first one compiles, and a busy machine takes long over any.
settings.register_profile("kardia", deadline=None)
settings.load_profile("kardia")

# Some tests press Ctrl-C. Where the suite was started in the background its shell has made that ignored, and they would
# wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that need an accelerator run with JAX_PLATFORMS=cuda,cpu (or tpu,cpu) and are skipped otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"
# No test reads or writes compiled programs of other runs, and none touches the user's own cache.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "kardia_jax-tests")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compile much and run little: without LLVM's expensive passes they take about a third less time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Compiled programs go with the module that made them: each holds maps of memory, of which Linux allows a process
    65,530, and the whole suite compiles so many that a later compilation crashed."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def file_limit():
    """``with file_limit(bytes):`` writes beyond this many bytes of a file fail with EFBIG.

    Lifted with the block, not with the test: the runner's own report may go to a file that is longer.
    """

    @contextlib.contextmanager
    def limited(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
