"""What several tools do alike: processes (``worker``, ``accelerate_launch``), time and memory (``meter``, ``rounds``,
``spread``), command lines, files, and the conditions of a measurement."""
