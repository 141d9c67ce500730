"""dpft: fine-tuning of Hugging Face language models under differential privacy, at long context."""

from dpft import audit
from dpft.clipping.passes import BookKeeping
from dpft.clipping.state import ClipStats
from dpft.errors import (
    AccountingError,
    BudgetExceededError,
    ClippingError,
    DPFTError,
    EngineError,
    KernelError,
    LedgerError,
    MissingPackageError,
    PrivacyConfigError,
    UnsupportedModuleError,
    WrapError,
)
from dpft.loader import PrivateDataLoader
from dpft.noise import GaussianNoise
from dpft.optimizer import DPOptimizer
from dpft.planning.hardware import Hardware
from dpft.planning.plan import plan
from dpft.planning.result import Plan
from dpft.prepare import prepare
from dpft.privacy import PrivacyConfig, PrivacySchedule, privacy_report, privacy_statement_markdown
from dpft.run import PrivacyRun
from dpft.wrap import book_keeping, clipped_loss, explain, stats, unwrap, wrap

__all__ = [
    "AccountingError",
    "BookKeeping",
    "BudgetExceededError",
    "ClipStats",
    "ClippingError",
    "DPFTError",
    "DPOptimizer",
    "EngineError",
    "GaussianNoise",
    "Hardware",
    "KernelError",
    "LedgerError",
    "MissingPackageError",
    "Plan",
    "PrivacyConfig",
    "PrivacyConfigError",
    "PrivacyRun",
    "PrivacySchedule",
    "PrivateDataLoader",
    "UnsupportedModuleError",
    "WrapError",
    "audit",
    "book_keeping",
    "clipped_loss",
    "explain",
    "plan",
    "prepare",
    "privacy_report",
    "privacy_statement_markdown",
    "stats",
    "unwrap",
    "wrap",
]
