"""What ``gpu.py`` runs on a GPU, or rehearses on a CPU.

``options`` reads the command line; ``runner`` takes the ``stages`` in order, each in a process that runs one function
of ``machine``, ``correctness``, ``steps``, ``profiles``, ``norms`` or ``commands``. What a stage finds goes row by row
through its ``context`` into its JSON file, and ``summary`` makes a table of all files.
"""
