"""``kardia plan``: what a run would need on so many chips, before there is one.

    kardia plan configs/kardia_qwen2_5_7b.py --mesh.fsdp 4 --mesh.tensor 4 --topology v5e:4x4

compiles the three programs of a GRPO step for the real model with abstract values - no weights, no accelerator - and
says per device: bytes by part, the compiler's peak, what collectives send, FLOPs, and an estimate of a step's time.

memory.py     bytes per device by arithmetic, from the config and the table of ``model/sharding.py``
abstract.py   the arguments of the programs as shapes with shardings
compiled.py   the programs compiled for a mesh: XLA's account of memory, collectives
hlo.py        collectives of a program, loops counted as often as they turn
estimate.py   FLOPs and bytes of a step against a chip's ceilings
advice.py     which knob makes it fit
report.py     the tables
run.py        a process of its own for the mesh, and the one object that ``--json`` prints
"""
