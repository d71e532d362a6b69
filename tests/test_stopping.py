"""A request to stop is one signal, or several at nearly the same moment; a later one ends the process."""

import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import signal, time
    from kardia_jax import stopping

    stopping.SAME_SECONDS = {same}
    with stopping.StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.made
        time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        print("saved", flush=True)
"""


@pytest.mark.parametrize(("same", "code", "said"), [(60, 0, "saved\n"), (0.01, -signal.SIGTERM, "")])
def test_a_second_signal_ends_the_process_unless_it_comes_with_the_first(same, code, said):
    program = textwrap.dedent(PROGRAM).format(same=same)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (code, said), ended.stderr
