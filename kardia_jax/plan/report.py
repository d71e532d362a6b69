"""A plan as tables for people; ``kardia plan --json`` prints the object itself."""

from typing import Any

from kardia_jax.bench.layout import table
from kardia_jax.chips import GIB
from kardia_jax.plan.advice import USABLE
from kardia_jax.plan.estimate import EFFICIENCY, NETWORK

PARTS = {
    "parameters": "parameters, float32",
    "moments": "moments",
    "frozen": "frozen base",
    "reference": "reference",
    "gradients": "gradients (their sum, and a micro-batch's own)",
    "activations": "activations of a micro-batch",
    "sampler_weights": "the sampler's copy of the weights",
    "kv": "keys and values",
    "sampling": "what sampling needs beside them",
}
"""Rows of the table of bytes."""


def text(found: dict[str, Any]) -> str:
    """Everything that a person would ask of a plan."""
    model, mesh = found["model"], found["mesh"]
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    devices = "one device" if found["devices"] == 1 else f"{found['devices']} devices: {sizes}"
    head = f"{model['source']}, {model['parameters'] / 1e9:.2f}e9 parameters, on {devices}"
    parts = [head, _bytes(found), _programs(found), *_gathered(found), _chips(found), *_advice(found), _notes(found)]
    return "\n\n".join(parts)


def gib(count: float) -> str:
    """Like ``1.77``; ``<0.01`` for what is hardly there."""
    return f"{count / GIB:.2f}" if not count or count >= GIB / 100 else "<0.01"


def _bytes(found: dict[str, Any]) -> str:
    """By arithmetic; attention without a kernel needs more for activations, so kinds of chips have columns."""
    columns: dict[str, dict[str, Any]] = {}
    for one in found["chips"]:
        columns.setdefault(one["attention"], one)
    rows = [
        [label, *(gib(one["bytes"][part]) for one in columns.values())]
        for part, label in PARTS.items()
        if any(one["bytes"][part] for one in columns.values())
    ]
    for phase in ("sample", "update"):
        rows.append([f"peak while it {phase}s", *(gib(one["peak_bytes"][phase]) for one in columns.values())])
    names = [f"attention by {name}" for name in columns]
    return table(["GiB per device, by arithmetic", *names], rows)


def _programs(found: dict[str, Any]) -> str:
    """As XLA counts them; a peak has what is there all the time and belongs to the phase, and is a CPU's on a CPU."""
    exact, peaks = found["compiled_for"] != "cpu", found["chips"][0]["program_peak_bytes"]
    rows = [
        [
            one["name"],
            f"{one['calls']:g}",
            gib(one["argument_bytes"]),
            gib(one["result_bytes"]),
            gib(one["temporary_bytes"]),
            *([gib(peaks[one["name"]])] if exact else []),
            ", ".join(f"{kind} {gib(sent)}" for kind, sent in one["sent_bytes"].items()) or "nothing",
            f"{one['compile_seconds']:.0f} s",
        ]
        for one in found["programs"]
    ]
    head = ["program", "calls", "arguments", "new results", "temporaries", *(["peak"] if exact else [])]
    head += ["sends in a call", "compiled in"]
    said = [f"{one['name']} does not fit: {one['refused']}" for one in found["programs"] if one["refused"]]
    totals = ", ".join(f"{kind} {gib(sent)}" for kind, sent in found["collective_bytes"].items()) or "nothing"
    flops = ", ".join(f"{phase} {count / 1e12:.3g}" for phase, count in found["chips"][0]["flops"].items())
    title = f"Programs compiled for {found['compiled_for']}, GiB per device:"
    return "\n".join(
        [title, table(head, rows), f"A device sends in a step: {totals}. TFLOP of a device: {flops}.", *said]
    )


def _gathered(found: dict[str, Any]) -> list[str]:
    """Said aloud: what of the parameters sampling brings together on every device."""
    fsdp, gathers = found["mesh"]["fsdp"], found["parameter_gathers"]
    if fsdp == 1 and not gathers:
        return []
    lines = [
        f"{name} gathers the parameters over fsdp ({fsdp} devices): {gib(one['bytes'])} GiB on each device, "
        + ("once a step." if one["times"] == 1 else f"{one['times']:g} times a step.")
        for name, one in gathers.items()
    ]
    decoding = [] if "decode" in gathers else ["Decoding gathers none: it reads the copy that `weights` has made."]
    return ["\n".join(["Full parameters in the sampler:", *lines, *decoding])]


def _chips(found: dict[str, Any]) -> str:
    rows = []
    for one in found["chips"]:
        times = ", ".join(f"{name} {seconds:.2g} ({one['bound'][name]})" for name, seconds in one["seconds"].items())
        peak = one["peak_bytes"]
        highest = peak["compiled"] if one["decided_by"] == "compiler" else max(peak["sample"], peak["update"])
        verdict = "fits" if one["fits"] else "does not fit"
        room = f"{gib(highest)} of {gib(one['usable_bytes'])}"
        rows.append([one["chip"], verdict, room, one["attention"], f"{one['step_seconds']:.2g}", times])
    return table(
        ["chip", "", "GiB (" + found["chips"][0]["decided_by"] + ")", "attention", "s a step", "by phase"], rows
    )


def _advice(found: dict[str, Any]) -> list[str]:
    return [
        f"{one['chip']} does not fit. What would give memory back:\n" + "\n".join(f"  {line}" for line in one["advice"])
        for one in found["chips"]
        if one["advice"]
    ]


def _notes(found: dict[str, Any]) -> str:
    shares = ", ".join(f"{100 * share:.0f} % of {name}" for name, share in EFFICIENCY.items())
    notes = [
        f"Seconds are an estimate: each phase by the lowest of three ceilings, of which it is taken to reach {shares}; "
        f"full lengths; the judge, the host and latencies are not in it. Beyond a node, {NETWORK / 1e9:.0f} GB/s.",
        f"{100 * USABLE:.0f} % of a chip's memory is taken to be usable.",
    ]
    if found["compiled_for"] == "cpu":
        notes.append(
            "Compiled for CPU devices: arguments are exact, but a CPU widens bfloat16, stores attention scores and "
            "makes no reduce-scatter of an all-reduce, so temporaries and bytes sent are too high; arithmetic decides. "
            "For TPUs --topology compiles the real programs."
        )
    return "\n".join(notes)
