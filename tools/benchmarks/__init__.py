"""Steps and norms by method, checked and then timed in turns, for ``benchmark_steps.py`` and ``benchmark_norms.py``.

Steps: ``step_options`` names ``presets`` of shapes, or makes them of the command line; for each, ``steps`` lets
``runner`` start one process for each method of ``cases``, in which ``worker`` builds the model and takes the steps.
Gradients come back as a ``digest`` and are compared with the ``oracle``'s, which shares no code with dpft; what is
right is timed in rounds. ``step_tables`` prints a result, ``plots`` draws the file. Norms: ``norm_options`` ->
``norms`` -> ``norm_times``, in this process -> ``norm_tables``.
"""
