"""Train the small public Llama that the recipes start from: ``recipes/assets/base_model``.

    python tools/train_base_model.py

The text is the documentation of the language that every Python carries, ``pydoc_data.topics``: no network, and public.
The docstrings of the standard library, the data that the recipe then protects, are **not** seen here. One topic,
``debugger``, is left out because it repeats the docstrings of ``pdb``; it is named here, not found by a search through
the docstrings at training time, since a public set chosen by looking at the private one is no longer public.

Bitwise repeatable on one machine with one version of Python and torch; the weights depend on both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.base_model.command import main

if __name__ == "__main__":
    main(__doc__)
