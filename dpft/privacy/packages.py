"""The accountant's packages, imported at first use: dp_accounting takes two seconds."""

from __future__ import annotations

import importlib
from typing import Any

from dpft.errors import MissingPackageError


def late(name: str) -> Any:
    """``dp_accounting``, ``scipy`` or a part of them.

    Raises:
        MissingPackageError: not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"dpft needs the packages dp-accounting and scipy to compute epsilon or to calibrate noise: pip install "
            f"dp-accounting scipy ({error}). Training with a given noise_multiplier works without them.",
            name=error.name,
        ) from error
