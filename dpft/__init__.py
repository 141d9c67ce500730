"""dpft: fine-tuning of Hugging Face language models under differential privacy, at long context."""

from typing import TYPE_CHECKING, Any

from dpft import audit
from dpft.adamw_bc import AdamWBC
from dpft.clipping.passes import BookKeeping
from dpft.clipping.state import ClipStats
from dpft.custom import check_rule, register_rule
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
from dpft.evaluation import EarlyStop, PrivateCounts, PrivateMean, private_counts, private_mean
from dpft.loader import PrivateDataLoader
from dpft.long_context.install import long_context
from dpft.noise import GaussianNoise
from dpft.optimizer import DPOptimizer
from dpft.planning.advice import advise
from dpft.planning.advice_result import Advice
from dpft.planning.hardware import Hardware
from dpft.planning.longest import Longest
from dpft.planning.plan import longest, plan
from dpft.planning.result import Plan
from dpft.prepare import prepare
from dpft.privacy import (
    Account,
    AdaptiveClip,
    PrivacyConfig,
    PrivacySchedule,
    UnitComparison,
    compare_units,
    privacy_report,
    privacy_statement_markdown,
)
from dpft.run import PrivacyRun
from dpft.tuning import Trial, Tuned, tune
from dpft.users import UserDataset, by_user
from dpft.wrap import book_keeping, clipped_loss, explain, stats, unwrap, wrap

if TYPE_CHECKING:
    from dpft.trainer.classes import DPTrainer, DPTrainingArguments, private_trainer

__version__ = "0.1.0"  # setup.cfg reads it from here: a string, not a computation

__all__ = [
    "Account",
    "AccountingError",
    "AdamWBC",
    "AdaptiveClip",
    "Advice",
    "BookKeeping",
    "BudgetExceededError",
    "ClipStats",
    "ClippingError",
    "DPFTError",
    "DPOptimizer",
    "DPTrainer",
    "DPTrainingArguments",
    "EarlyStop",
    "EngineError",
    "GaussianNoise",
    "Hardware",
    "KernelError",
    "LedgerError",
    "Longest",
    "MissingPackageError",
    "Plan",
    "PrivacyConfig",
    "PrivacyConfigError",
    "PrivacyRun",
    "PrivacySchedule",
    "PrivateCounts",
    "PrivateDataLoader",
    "PrivateMean",
    "Trial",
    "Tuned",
    "UnitComparison",
    "UnsupportedModuleError",
    "UserDataset",
    "WrapError",
    "advise",
    "audit",
    "book_keeping",
    "by_user",
    "check_rule",
    "clipped_loss",
    "compare_units",
    "explain",
    "long_context",
    "longest",
    "plan",
    "prepare",
    "privacy_report",
    "privacy_statement_markdown",
    "private_counts",
    "private_mean",
    "private_trainer",
    "register_rule",
    "stats",
    "tune",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Hugging Face's Trainer takes seconds to import: only who uses it waits for it."""
    if name in ("DPTrainer", "DPTrainingArguments", "private_trainer"):
        from dpft.trainer import classes

        return getattr(classes, name)
    raise AttributeError(f"module 'dpft' has no attribute {name!r}")
