"""Sampling, accounting, ledger and report: the basis of the privacy guarantee. Imports only errors from dpft."""

from __future__ import annotations

from dpft.privacy.accountant import Event, check_supported, compose_epsilon, discretization, epsilon
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.calibration import calibrate_noise_multiplier, max_steps_within
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.epsilon_meter import EpsilonMeter
from dpft.privacy.ledger import Ledger, LedgerContent
from dpft.privacy.mechanism import Mechanism
from dpft.privacy.report import privacy_report, privacy_statement_markdown
from dpft.privacy.sampler import (
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
    "AdaptiveClip",
    "EpsilonMeter",
    "Event",
    "FixedSizeSampler",
    "Ledger",
    "LedgerContent",
    "LogicalBatchSampler",
    "Mechanism",
    "PhysicalBatch",
    "PhysicalBatchSampler",
    "PoissonSampler",
    "PrivacyConfig",
    "PrivacySchedule",
    "ShuffleSampler",
    "TruncatedPoissonSampler",
    "calibrate_noise_multiplier",
    "check_supported",
    "compose_epsilon",
    "discretization",
    "draw_seed",
    "epsilon",
    "make_sampler",
    "max_steps_within",
    "physical_batches",
    "privacy_report",
    "privacy_statement_markdown",
]
