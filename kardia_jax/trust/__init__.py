"""Can this judge be trusted? For people at a terminal: ``kardia judge probe`` and ``kardia judge show``.

    tables.py      a probe's numbers as tables
    show.py        one graded completion: from a run's file, or graded anew
    rendering.py   the same on the terminal

The numbers themselves are made in ``judge/probe.py``.
"""
