"""The exceptions that a user of dpft can meet.

Every one derives from :class:`DPFTError`. A message says what came, what was expected, and what to do about it.
"""

from __future__ import annotations


class DPFTError(Exception):
    """Base class of everything that dpft raises on purpose."""


class PrivacyConfigError(DPFTError, ValueError):
    """A privacy parameter is missing, contradictory or out of range."""


class UnsupportedModuleError(DPFTError, ValueError):
    """A trainable parameter is not covered by exactly one rule, or a layer mixes examples."""


class WrapError(DPFTError, RuntimeError):
    """The model is not (or no longer) in the state that ``wrap`` left it in."""


class ClippingError(DPFTError, RuntimeError):
    """A backward pass would leave something else than the clipped sum in ``.grad``."""


class EngineError(DPFTError, RuntimeError):
    """The training engine, or its configuration, would void the privacy guarantee."""


class LedgerError(DPFTError, RuntimeError):
    """The ledger of releases is missing, damaged, or contradicts what it is asked to continue."""


class BudgetExceededError(DPFTError, RuntimeError):
    """One more release would spend more than the privacy budget allows."""


class AccountingError(DPFTError, ValueError):
    """No theorem that dpft implements covers the mechanism that was asked for."""


class MissingPackageError(DPFTError, ImportError):
    """A package that is needed for what was asked for is not installed."""


class KernelError(DPFTError, RuntimeError):
    """The implementation of a kernel that was named cannot run here; no other is taken in its place."""
