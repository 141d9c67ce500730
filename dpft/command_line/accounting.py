"""``dpft epsilon``, ``dpft ledger`` and ``dpft card``: what was spent, or would be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dpft.command_line.mechanism import add_mechanism, mechanism_of
from dpft.errors import LedgerError
from dpft.privacy.accounting.accountant import epsilon, rounded_up
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.ledger import Ledger, LedgerContent
from dpft.privacy.mechanism import SAMPLERS, Mechanism
from dpft.privacy.report import (
    NOT_ISOLATED,
    PAID_FROM,
    constants_of,
    privacy_report,
    privacy_statement_markdown,
    unit_of,
)
from dpft.privacy.schedule import PrivacySchedule

LEDGERS = ("ledger.jsonl", "privacy_ledger.jsonl")  # as the recipes and dpft.prepare name them


def add_to(commands: Any) -> None:
    """Add the commands."""
    command = commands.add_parser("epsilon", help="epsilon of a training, from its constants")
    command.add_argument("--sigma", type=float, required=True, help="noise multiplier, in units of the clip norm")
    command.add_argument("--rate", type=float, help="poisson: sample rate q, expected logical batch / examples")
    command.add_argument("--batch-size", type=float, help="instead, and for all others: expected logical batch")
    command.add_argument("--examples", type=int, help="with --batch-size: number of examples", metavar="N")
    command.add_argument("--steps", type=int, required=True, help="logical batches")
    command.add_argument("--delta", type=float, required=True, help="well below 1 / number of examples")
    command.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="default pld, the tighter one")
    add_mechanism(command)
    command.add_argument("--sampler", choices=SAMPLERS, help="default: poisson, or the one of the mechanism")
    command.add_argument("--max-batch-size", type=int, help="truncated_poisson: its cap", metavar="B")
    command.set_defaults(run=of_constants)

    command = commands.add_parser("ledger", help="what a ledger says, or whether it is whole")
    command.add_argument("action", choices=("show", "verify"), help="show: releases and epsilon; verify: is it whole?")
    command.add_argument("path", help="a ledger, or the folder of a run")
    command.add_argument("--json", action="store_true", help="show: as JSON")
    command.set_defaults(run=of_ledger)

    command = commands.add_parser("card", help="the privacy statement of a run, from its ledger")
    command.add_argument("path", help="a ledger, or the folder of a run")
    command.add_argument("--clipping", help="the mode of the run, which the ledger does not hold", metavar="MODE")
    command.add_argument("--tuning", help="how the hyperparameters were chosen", metavar="TEXT")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=of_run)


def of_constants(args: argparse.Namespace) -> str:
    """Epsilon, rounded up: that of a :class:`~dpft.privacy.config.PrivacyConfig` with these constants."""
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; expected at least 1")
    if not 0 < args.delta < 1:
        raise ValueError(f"--delta is {args.delta:g}; expected a number between 0 and 1")
    if (args.batch_size is None) != (args.examples is None):
        raise ValueError("--batch-size and --examples belong together; give both, or the --rate of poisson")
    sampler, constants = mechanism_of(args)
    if args.examples is None:
        if sampler != "poisson" or args.max_batch_size is not None:
            raise ValueError(f"sampler {sampler} needs --batch-size and --examples; --rate is of poisson alone")
        if args.rate is None:
            raise ValueError("neither --rate nor --batch-size with --examples is given; give the rate, or both")
        mechanism = Mechanism(sampler="poisson", noise_multiplier=args.sigma, sample_rate=args.rate)
        return rounded_up(epsilon(mechanism, args.steps, args.delta, accountant=args.accountant))
    if args.rate is not None:
        raise ValueError("--rate follows from --batch-size and --examples; leave it out")
    config = PrivacyConfig(
        noise_multiplier=args.sigma,
        target_delta=args.delta,
        expected_batch_size=args.batch_size,
        num_steps=args.steps,
        accountant=args.accountant,
        max_batch_size=args.max_batch_size,
        **constants,
    )
    return rounded_up(config.resolve(args.examples).epsilon)


def find_ledger(path: str) -> Path:
    """The file, or the ledger in a folder.

    Raises:
        LedgerError: there is none.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        return given
    for name in LEDGERS:
        if (given / name).is_file():
            return given / name
    raise LedgerError(f"no ledger in the folder {path}; expected {' or '.join(LEDGERS)}. Give the file.")


def _read(path: str) -> tuple[LedgerContent, PrivacySchedule]:
    content = Ledger.read(find_ledger(path))
    if content.header.get("schedule") is None:
        raise LedgerError(f"the ledger {path} holds no schedule; expected one that dpft.prepare began")
    return content, PrivacySchedule.from_dict(content.header["schedule"])


def _report(
    content: LedgerContent, schedule: PrivacySchedule, clipping: str | None = None, tuning: str | None = None
) -> dict[str, Any]:
    """The report; the ledger's header says whether gradients were clipped, a test seed given, and what to note."""
    conditions = content.header.get("config") or {}
    seeded = bool(conditions.get("seeded", False))
    notes = [] if conditions.get("isolated", True) else [NOT_ISOLATED]
    if conditions.get("account") is not None:
        notes.append(PAID_FROM.format(account=conditions["account"]))
    return privacy_report(
        schedule,
        content,
        clipping=clipping if conditions.get("clipped", True) else "none",
        noise_seed_known=seeded,
        sampling_seed_known=seeded,
        tuning=tuning,
        notes=tuple(notes),
    )


def of_ledger(args: argparse.Namespace) -> str:
    """What is in a ledger."""
    if args.action == "verify":
        content = Ledger.read(find_ledger(args.path))
        torn = f", {content.torn} of them torn by a crash and counted" if content.torn else ""
        return f"whole: {content.count} releases{torn}, run {content.run_id}"
    content, schedule = _read(args.path)
    report = _report(content, schedule)
    spent, reasons = float(report["epsilon_spent"]), report["not_private_because"]
    if args.json:
        segments = [{"mechanism": m.to_dict(), "releases": count} for m, count in content.events]
        found = {"run_id": content.run_id, "releases": content.count, "torn": content.torn, "epsilon": str(spent)}
        found |= {"unit": unit_of(report)}
        found |= {"delta": schedule.target_delta, "not_private_because": reasons, "segments": segments}
        return json.dumps(found, indent=1)
    lines = [
        *([f"NOT PRIVATE        {'; '.join(reasons)}"] if reasons else []),
        f"run                {content.run_id}",
        f"releases           {content.count} of {schedule.num_steps} planned",
        f"epsilon spent      {rounded_up(spent)} at delta {schedule.target_delta:g}",
        f"privacy unit       {unit_of(report)}",
        f"mechanism          {report['mechanism']}",
    ]
    for number, segment in enumerate({"mechanism": m.to_dict(), "releases": count} for m, count in content.events):
        lines.append(f"start {number + 1:<13}{segment['releases']} releases: {constants_of(segment, report)}")
    return "\n".join(lines)


def of_run(args: argparse.Namespace) -> str:
    """The statement."""
    content, schedule = _read(args.path)
    report = _report(content, schedule, args.clipping, args.tuning)
    return json.dumps(report, indent=1) if args.json else privacy_statement_markdown(report).rstrip()
