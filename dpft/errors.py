"""The exceptions that a user of dpft can meet.

All derive from :class:`DPFTError`. Each message says what was received, what was expected, and what to do about it.
"""

from __future__ import annotations


class DPFTError(Exception):
    """Base class of dpft's own exceptions."""


class PrivacyConfigError(DPFTError, ValueError):
    """A privacy parameter is missing, contradictory or out of range."""


class UnsupportedModuleError(DPFTError, ValueError):
    """A trainable parameter is not covered by exactly one rule, or a layer mixes examples."""


class WrapError(DPFTError, RuntimeError):
    """The model is not (or no longer) in the state that ``wrap`` left it in."""


class ClippingError(DPFTError, RuntimeError):
    """A backward pass would leave something other than the clipped sum in ``.grad``."""


class EngineError(DPFTError, RuntimeError):
    """The training engine, or its configuration, would void the privacy guarantee."""


class LedgerError(DPFTError, RuntimeError):
    """The ledger of releases is missing, damaged, or inconsistent with the run that it is to continue."""


class BudgetExceededError(DPFTError, RuntimeError):
    """One more release would spend more than the privacy budget allows."""


class AccountingError(DPFTError, ValueError):
    """No theorem that dpft implements covers the mechanism that was requested."""


class MissingPackageError(DPFTError, ImportError):
    """A package that this operation needs is not installed."""


class KernelError(DPFTError, RuntimeError):
    """The kernel implementation that was requested cannot run here; dpft does not fall back to another one."""
