"""What the scripts of the peers share: arguments, prompts of an exact length, timers, and the JSON line at the end.

It knows none of the peers, and runs in each one's own environment.
"""

import argparse
import functools
import json
import random
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

SENTENCE = "I have been so tired of it all and you are the only one that I can talk to about my work at home"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The workload, with the names that ``kardia bench`` gives it."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a Hugging Face directory with tokenizer")
    made.add_argument("--prompts", type=int, default=2)
    made.add_argument("--group", type=int, default=8)
    made.add_argument("--prompt-len", type=int, default=512)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--beta", type=float, default=0.04)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--steps", type=int, default=2, help="measured, after one that is not")
    return made


def text_of(tokenizer: Any, length: int, seed: int) -> str:
    """A text that this tokenizer, as the peer calls it, makes exactly ``length`` tokens of."""
    draw, known = random.Random(seed), SENTENCE.split()
    words = [draw.choice(known) for _ in range(length)]

    def tokens() -> int:
        return len(tokenizer(" ".join(words))["input_ids"])

    while tokens() > length:
        words.pop()
    while tokens() < length:
        words.append("a")
    if tokens() != length:
        raise SystemExit(f"prompt-len: no text of exactly {length} tokens found with this tokenizer")
    return " ".join(words)


def timed(times: list[float], call: Callable[..., Any], wait: Callable[[Any], object]) -> Callable[..., Any]:
    """The same function; the seconds of each call, waited for, are added to ``times``."""

    @functools.wraps(call)
    def outer(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        wait(result)
        times.append(time.perf_counter() - start)
        return result

    return outer


def report(
    phases: dict[str, list[float]], lengths: tuple[int, int], versions: dict[str, str], device_peak: int | None
) -> None:
    """Prints the line: medians over all steps but the first. ``lengths`` are those seen, of prompt and completion."""
    steps = [sum(times) for times in zip(*phases.values(), strict=True)]
    line = {
        "step_seconds": median(steps[1:]),
        "step_seconds_all": steps[1:],
        "first_step_seconds": steps[0],
        "seconds": {name: median(times[1:]) for name, times in phases.items()},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "peak_device_gb": None if device_peak is None else device_peak / 1e9,
        "prompt_len": lengths[0],
        "new_tokens": lengths[1],
        "versions": versions,
    }
    print(json.dumps(line))
