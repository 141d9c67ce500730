"""The operating system's generator, with a seed, for tests whose verdict is a statistic of a private run."""

from __future__ import annotations

import os
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy.random  # noqa: F401  # keeps the secrets.randbits that it finds at its import, which must be the real one


@contextmanager
def fixed_draws(seed: int) -> Iterator[None]:
    """Noise, batches, canaries and coins are the same on every run; dpft takes them from where it always does.

    A ``test_seed`` would take another way through the code. An audit of a sound mechanism fails by chance in up to 2
    of 10,000, so that a suite with a dozen of them, drawn anew each time, would be red once in some 400 runs.
    """
    source = random.Random(seed)

    def seeded(fixed: Callable[[int], Any], fresh: Callable[[int], Any]) -> Callable[[int], Any]:
        def drawn(size: int) -> Any:
            # Others draw where they are first imported, which is in this test or in one before it.
            asks = sys._getframe(1).f_globals["__name__"]
            return fixed(size) if asks.partition(".")[0] == "dpft" else fresh(size)

        return drawn

    with (
        mock.patch.object(os, "urandom", seeded(source.randbytes, os.urandom)),
        mock.patch.object(secrets, "randbits", seeded(source.getrandbits, secrets.randbits)),
        mock.patch.object(secrets, "randbelow", seeded(source.randrange, secrets.randbelow)),
    ):
        yield
