"""What a private step costs under each engine, counted, for ``measure_engines.py``.

``command`` asks ``launches`` for the cases of an engine; these run in ``worker``, on two ranks, which count bytes
sent, traversals, FLOPs and memory. Of the two ranks' counts ``launches`` makes rows beside plain training's.
"""
