"""``kardia bench``: how long a step takes, where the time goes, and how far that is from what the machine can do.

workload.py      the model and the batch that are measured
measure.py       step, sample and update: the programs of train.py, timed by phase
ceilings.py      copy bandwidth and matmul FLOP/s of this device, measured in the same run
work.py          FLOPs and bytes of each phase, from the spec, with the prompt shared and repeated
report.py        what was measured against the ceilings, as JSON and as text
layout.py        the machine's description and tables
run.py           one benchmark from its config to its results
conversion.py    import and export of a synthetic checkpoint
"""
