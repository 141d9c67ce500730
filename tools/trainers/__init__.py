"""Trainers of plain, Opacus' and dpft's training, profiled side by side, for ``profile_trainers.py``.

``options`` makes shapes of the command line. For each shape and each of the ``implementations``, ``profiles`` lets
``measurement`` start a process, in which ``worker`` measures memory, classes of ``operators`` and a profiler's trace;
then all trainers are timed in common rounds. ``report`` makes tables and sentences of the rows.
"""
