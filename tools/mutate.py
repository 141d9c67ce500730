"""Break dpft in one place at a time, and see whether a test notices.

    python tools/mutate.py                         # all mutations: some twenty minutes
    python tools/mutate.py --only noise_dropped cross_term_dropped
    python tools/mutate.py --list
    python tools/mutate.py --json docs/benchmarks/mutations.json

Each mutation is a small change of dpft's text on a copy of the project, with the tests that are meant to catch it
(tools/mutations/catalogue.py). It is caught if one of them fails. Exit status 1 if one survives, or no longer applies.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.mutations.command import execute, parse


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
