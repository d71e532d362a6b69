"""Can this judge be trusted? For people at a terminal: ``kardia judge probe``, ``show`` and ``gap``.

    tables.py      a probe's numbers as tables
    show.py        one graded completion: from a run's file, or graded anew
    rendering.py   the same on the terminal
    gap.py         a run's audit, step by step

The numbers themselves are made in ``judge/probe.py``.
"""
