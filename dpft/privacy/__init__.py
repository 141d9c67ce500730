"""Sampling, accounting, ledger and report: the basis of the privacy guarantee. Imports only errors from dpft."""

from __future__ import annotations

from dpft.privacy.account.account import Account
from dpft.privacy.account.events import Protects, PureRelease, Selection, Use
from dpft.privacy.account.file import Entry
from dpft.privacy.account.filter import PrivacyFilter
from dpft.privacy.accounting.accountant import Event, check_supported, compose_epsilon, discretization, epsilon
from dpft.privacy.accounting.calibration import calibrate_noise_multiplier, max_steps_within
from dpft.privacy.accounting.epsilon_meter import EpsilonMeter
from dpft.privacy.accounting.units import UnitComparison, compare_units
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.correlated.optimum import rms_error
from dpft.privacy.correlated.strategy import Strategy
from dpft.privacy.ledger import Ledger, LedgerContent
from dpft.privacy.mechanism import Mechanism
from dpft.privacy.report import privacy_report, privacy_statement_markdown
from dpft.privacy.samplers.cyclic_samplers import CyclicPoissonSampler, FixedOrderSampler
from dpft.privacy.samplers.sampler import (
    BallsAndBinsSampler,
    FixedSizeSampler,
    LogicalBatchSampler,
    PhysicalBatch,
    PhysicalBatchSampler,
    PoissonSampler,
    ShuffleSampler,
    TruncatedPoissonSampler,
    draw_seed,
    make_sampler,
    physical_batches,
)
from dpft.privacy.schedule import PrivacySchedule

__all__ = [
    "Account",
    "AdaptiveClip",
    "BallsAndBinsSampler",
    "CyclicPoissonSampler",
    "Entry",
    "EpsilonMeter",
    "Event",
    "FixedOrderSampler",
    "FixedSizeSampler",
    "Ledger",
    "LedgerContent",
    "LogicalBatchSampler",
    "Mechanism",
    "PhysicalBatch",
    "PhysicalBatchSampler",
    "PoissonSampler",
    "PrivacyConfig",
    "PrivacyFilter",
    "PrivacySchedule",
    "Protects",
    "PureRelease",
    "Selection",
    "ShuffleSampler",
    "Strategy",
    "TruncatedPoissonSampler",
    "UnitComparison",
    "Use",
    "calibrate_noise_multiplier",
    "check_supported",
    "compare_units",
    "compose_epsilon",
    "discretization",
    "draw_seed",
    "epsilon",
    "make_sampler",
    "max_steps_within",
    "physical_batches",
    "privacy_report",
    "privacy_statement_markdown",
    "rms_error",
]
