"""What a run tells people: means, files, a live console, trackers, and the intervals of an evaluation.

measures.py     (sum, weight) pairs: added over steps, divided once
jsonl.py        metrics.jsonl and rollouts.jsonl, cut back on resume
phases.py       seconds by phase
compilations.py programs compiled since the last step
memory.py       peaks of memory, host and device
console.py      progress and metrics on the terminal
results.py      the table at the end
trackers.py     the same metrics for TensorBoard, W&B, trackio, MLflow
intervals.py    95 % intervals and macro-F1
"""
