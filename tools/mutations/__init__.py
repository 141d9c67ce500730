"""Mutations of dpft, for ``mutate.py``.

``catalogue`` has them all, from ``gradients`` and ``mechanism``: a file, a text in it, what is put in its place, and
the tests that must fail. ``command`` makes a copy of the project for each, changes it, runs these tests there, and
writes a table of what was caught.
"""
