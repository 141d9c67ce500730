"""``--mechanism``, ``--bands``, ``--buffers``: the options that name how noise is correlated over the steps."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from dpft.privacy.config_checks import MechanismName
from dpft.privacy.mechanism import STRATEGY_OF


def add_mechanism(command: argparse.ArgumentParser, default: str | None = "dp_sgd") -> None:
    """Add the options; ``default``: None where it matters whether the mechanism was given."""
    names = get_args(MechanismName)
    command.add_argument("--mechanism", choices=names, default=default, help="of the noise (default dp_sgd)")
    command.add_argument("--bands", type=int, help="bandmf: its bands", metavar="B")
    command.add_argument("--buffers", type=int, help="blt: its buffers", metavar="N")


def mechanism_of(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The sampler, and the arguments of :class:`~dpft.privacy.config.PrivacyConfig`, which refuses what is no pair."""
    mechanism = args.mechanism or "dp_sgd"
    own = {kind: sampler for sampler, kind in STRATEGY_OF.items()}.get(mechanism, "poisson")
    sampler = getattr(args, "sampler", None) or own
    return sampler, {"mechanism": mechanism, "bands": args.bands, "buffers": args.buffers, "sampler": sampler}
