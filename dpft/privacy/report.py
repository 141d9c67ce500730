"""The privacy statement: what was run, what it guarantees, and under which assumptions."""

from __future__ import annotations

import json
import math
from importlib import metadata
from typing import Any

from dpft.privacy.accounting.accountant import (
    Event,
    check_events,
    compose_epsilon,
    discretization,
    of_one_run,
    rounded_up,
)
from dpft.privacy.adaptive_clip import THEOREM
from dpft.privacy.correlated.strategy import Strategy
from dpft.privacy.ledger import Ledger, LedgerContent
from dpft.privacy.schedule import PrivacySchedule

_ADJACENCY = {
    "add_or_remove_one": "one {unit} is added or removed",
    "replace_one": "one {unit} is replaced by another",
    "zero_out": "the gradient of one {unit} is replaced by zero",
}
_MECHANISM = {
    "shuffle": "Gaussian, no amplification claimed",
    "balls_and_bins": "Gaussian, each example in one random batch of every epoch",
    "cyclic_poisson": "banded matrix factorisation (correlated Gaussian noise), amplified by cyclic Poisson sampling",
    "fixed_order": "BLT matrix factorisation (correlated Gaussian noise), no amplification claimed",
}
_PARTS = {"bandmf": "bands", "blt": "buffers"}
GROUPS = "sensitivity C, the same noise on every parameter (McMahan et al. 2018, arXiv 1710.06963)"
NOT_ISOLATED = (
    "no example's gradient depends on the examples beside it: the check that runs a row alone was switched off "
    "(isolation='off')"
)
PAID_FROM = (
    "other uses of these records are not counted here; this training is one of those that were paid from the account "
    "{account}, whose statement counts them all"
)
_CLIPPING = ("max_grad_norm", "clip_function", "clip_gamma", "clip_groups")
_LIBRARIES = ("dpft", "dp-accounting", "numpy", "scipy", "torch", "accelerate", "transformers")


def privacy_report(
    schedule: PrivacySchedule,
    ledger: Ledger | LedgerContent | int | None,
    *,
    clipping: str | None = None,
    noise_seed_known: bool = False,
    sampling_seed_known: bool = False,
    tuning: str | None = None,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Everything a reader needs to judge the guarantee, JSON-serialisable.

    Args:
        schedule: what was planned.
        ledger: the releases that were made; without a file, their number under the schedule's mechanism; None if they
            were not counted, and then no epsilon is stated as spent.
        clipping: the mode, as given to ``dpft.wrap``; ``"none"`` is not private.
        noise_seed_known: the noise had a fixed seed.
        sampling_seed_known: the sampler had a fixed seed.
        tuning: how hyperparameters were chosen, in words; None: the report says that it is not accounted for.
        notes: further assumptions, such as packed documents.

    Returns:
        A dictionary; infinite numbers are the string ``inf``. ``private`` is false where ``not_private_because`` has
        reasons, and both epsilons are ``inf`` then (a spent epsilon of None stays None).

    Raises:
        AccountingError: the ledger's releases have no common epsilon.
        MissingPackageError: there is noise, and the accountant's packages are not installed: no report states a
            guarantee without an epsilon.
    """
    events = _events(schedule, ledger)
    planned: float = schedule.epsilon
    spent = None
    if events is not None:
        # The schedule's unit and adjacency are stated, also where another configuration made the releases.
        check_events(((schedule.mechanism, 1), *events), schedule.target_delta, schedule.accountant)
        spent = compose_epsilon(of_one_run(events), schedule.target_delta, accountant=schedule.accountant)
    reasons = []
    if schedule.noise_multiplier == 0 or any(mechanism.noise_multiplier == 0 for mechanism, _ in events or []):
        reasons.append("no noise was added (noise multiplier 0)")
    if clipping == "none":
        reasons.append("gradients were not clipped")
    if noise_seed_known:
        reasons.append("noise seed known")
    if sampling_seed_known:
        reasons.append("sampling seed known")
    if reasons:
        planned, spent = math.inf, None if spent is None else math.inf
    mechanism = schedule.mechanism
    # What is composed of releases under add/remove and under zero-out holds under zero-out.
    adjacency = next((m.adjacency for m, _ in events or [] if m.adjacency == "zero_out"), mechanism.adjacency)
    noisy = [m for m, _ in [(mechanism, 0), *(events or [])] if m.noise_multiplier > 0]
    grids = [discretization(m) for m in noisy] if schedule.accountant == "pld" else []
    return {
        "private": not reasons,
        "not_private_because": reasons,
        "epsilon_spent": _number(spent),
        "epsilon_planned": _number(planned),
        "target_epsilon": schedule.target_epsilon,
        "delta": schedule.target_delta,
        "unit": schedule.unit,
        "examples_per_user": schedule.examples_per_user,
        "item": schedule.item,
        "adjacency": adjacency,
        "neighbours": _ADJACENCY[adjacency].format(unit=schedule.item or schedule.unit),
        "mechanism": _MECHANISM.get(mechanism.sampler, "subsampled Gaussian"),
        "strategy": None if mechanism.strategy is None else mechanism.strategy.to_dict(),
        "sampler": schedule.sampler,
        "sample_rate": schedule.sample_rate if mechanism.sample_rate is not None else None,
        "noise_multiplier": schedule.noise_multiplier,
        "max_grad_norm": schedule.max_grad_norm,
        "clip_groups": None if schedule.clip_groups is None else schedule.described_groups(),
        "adaptive_clip": None if schedule.adaptive_clip is None else schedule.described_adaptation(),
        "next_clip_norm": _next_clip_norm(schedule, ledger),
        "sensitivity": mechanism.sensitivity,
        "clip_function": schedule.clip_function,
        "clip_gamma": schedule.clip_gamma if schedule.clip_function == "automatic" else None,
        "clipping": clipping,
        "expected_batch_size": schedule.expected_batch_size,
        "max_batch_size": schedule.max_batch_size,
        "steps_released": None if events is None else sum(count for _, count in events),
        "steps_planned": schedule.num_steps,
        "dataset_size": schedule.dataset_size,
        "accountant": schedule.accountant,
        "discretization": max(grids, default=None),
        "planned_mechanism": mechanism.to_dict(),
        "segments": [{"mechanism": m.to_dict(), "releases": count} for m, count in events or []],
        "assumptions": [*schedule.assumptions, *_clipped_otherwise(schedule, ledger), *notes],
        "tuning": tuning or "the choice of hyperparameters is not accounted for",
        "noise_rng": _noise_rng(schedule, noise_seed_known),
        "sampling_rng": "fixed seed" if sampling_seed_known else "PCG64DXSM seeded by the operating system",
        "run_id": ledger.run_id if isinstance(ledger, (Ledger, LedgerContent)) else None,
        "config_fingerprint": schedule.config_fingerprint,
        "versions": _versions(),
    }


def privacy_statement_markdown(report: dict[str, Any]) -> str:
    """The section of a model card.

    Args:
        report: from :func:`privacy_report`.

    Returns:
        Markdown, beginning with a heading of level two, ending with a newline.
    """
    unit = unit_of(report)
    lines = ["## Privacy statement", ""]
    if not report["private"]:
        lines += [f"**NOT PRIVATE: {'; '.join(report['not_private_because'])}.** No guarantee of any kind holds.", ""]
    elif report["epsilon_spent"] is None:
        lines += ["**No ledger was kept: what was spent is unknown.** The schedule is below; it is no guarantee.", ""]
    else:
        lines += [
            f"Training satisfied ({_show(report['epsilon_spent'])}, {report['delta']:g})-differential privacy, where "
            f"neighbouring datasets are those in which {report['neighbours']}.",
            "",
        ]
    rate = report["sample_rate"]
    cap = "" if report["max_batch_size"] is None else f", capped at {report['max_batch_size']}"
    gamma = "" if report["clip_gamma"] is None else f", gamma {report['clip_gamma']:g}: C n / (n + gamma) < C"
    clip = f"{report['max_grad_norm']:g} (sensitivity {report['sensitivity']})"
    if report.get("adaptive_clip") is not None:
        now = "" if report["next_clip_norm"] is None else f", {report['next_clip_norm']:.4g} at the end"
        clip = f"{report['max_grad_norm']:g} at first{now}, each in the ledger (sensitivity {report['sensitivity']})"
    grid = "" if report["discretization"] is None else f", discretisation {report['discretization']:g}, pessimistic"
    rows = [
        ("Epsilon spent", _show(report["epsilon_spent"], "unknown")),
        ("Epsilon planned", _show(report["epsilon_planned"])),
        ("Target epsilon", _show(report["target_epsilon"], "none; the noise was given")),
        ("Delta", f"{report['delta']:g}"),
        ("Privacy unit", unit),
        ("Adjacency", f"{report['adjacency']} ({report['neighbours']})"),
        ("Mechanism", report["mechanism"]),
        *_correlation(report),
        ("Sampler", report["sampler"] + ("" if rate is None else f", sample rate {rate:.6g}")),
        ("Expected logical batch", f"{report['expected_batch_size']:g}{cap}"),
        ("Noise multiplier", f"{report['noise_multiplier']:.6g}"),
        ("Clip norm C", clip),
        *([("Clip groups", f"{report['clip_groups']}; {GROUPS}")] if report.get("clip_groups") else []),
        *([("Adaptive clip norm", f"{report['adaptive_clip']}; {THEOREM}")] if report.get("adaptive_clip") else []),
        ("Clip function", report["clip_function"] + gamma),
        ("Clipping", report["clipping"] or "not stated"),
        ("Steps released / planned", f"{_show(report['steps_released'], 'unknown')} / {report['steps_planned']}"),
        ("Number of examples", _show(report["dataset_size"], "not disclosed")),
        ("Accountant", f"dp_accounting {report['accountant'].upper()}{grid}"),
        ("Noise generator", report["noise_rng"]),
        ("Sampling generator", report["sampling_rng"]),
        ("Hyperparameter tuning", report["tuning"]),
        ("Ledger", _show(report["run_id"], "none")),
        ("Configuration", report["config_fingerprint"][:16]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    planned = report.get("planned_mechanism")  # which the table has; older reports do not
    others = planned is not None and any(segment["mechanism"] != planned for segment in report["segments"])
    if others or len(report["segments"]) > 1:
        lines += ["", "Releases, over all starts of the run:", ""]
        for segment in report["segments"]:
            lines.append(f"- {segment['releases']}: {constants_of(segment, report)}")
    lines += ["", "Assumptions:", "", *(f"- {line}" for line in report["assumptions"])]
    return "\n".join(lines) + "\n"


def unit_of(report: dict[str, Any]) -> str:
    """What is protected, in words, of a report."""
    if report["unit"] == "user":
        return f"user (at most {report['examples_per_user']} examples each)"
    return str(report.get("item") or report["unit"])


def constants_of(segment: dict[str, Any], report: dict[str, Any]) -> str:
    """The constants of a start of the run, in words.

    Without the accountant's unit where the report says what an example is: it would be ``example`` in any case. The
    strategy of correlated noise is named only: the statement has its numbers.
    """
    left_out = {"strategy", *(["unit"] if report.get("item") else [])}
    found = [f"{key} {value}" for key, value in segment["mechanism"].items() if key not in left_out]
    if (strategy := segment["mechanism"].get("strategy")) is not None:
        found.append(f"strategy {strategy['kind']} of {len(strategy['weights'])} {_PARTS[strategy['kind']]}")
    return ", ".join(found)


def _correlation(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The strategy of correlated noise, in the numbers from which its sensitivity can be computed."""
    if report.get("strategy") is None:
        return []
    strategy = Strategy.from_dict(report["strategy"])
    numbers = ", ".join(f"{weight:.10g}" for weight in strategy.weights)
    column = f"first column {numbers}"
    if strategy.kind == "blt":
        decays = ", ".join(f"{decay:.10g}" for decay in strategy.decays)
        column = f"first column 1, sum_i w_i d_i^(j-1) with w = {numbers}; d = {decays}"
    return [
        (
            "Strategy matrix C",
            f"{strategy.steps} x {strategy.steps}, lower triangular Toeplitz, {column}; the noise of all steps is "
            f"C^-1 z, and z has the standard deviation noise multiplier x {strategy.scale:.10g} x C",
        ),
        (
            "Participation",
            f"an example is in at most one of {strategy.min_separation} steps that follow each other: at most "
            f"{strategy.participations} of {strategy.steps}",
        ),
    ]


def _events(schedule: PrivacySchedule, ledger: Ledger | LedgerContent | int | None) -> list[Event] | None:
    if ledger is None:
        return None
    if isinstance(ledger, int):
        return [(schedule.mechanism, ledger)]
    events = ledger.events() if isinstance(ledger, Ledger) else ledger.events
    return [event for event in events if event[1] > 0]


def _next_clip_norm(schedule: PrivacySchedule, ledger: Ledger | LedgerContent | int | None) -> float | None:
    """Under ``adaptive_clip``, the clip norm after the last release, where a ledger has it."""
    if schedule.adaptive_clip is None or not isinstance(ledger, (Ledger, LedgerContent)) or not ledger.count:
        return None
    return ledger.clip_norm_after(ledger.count)


def _clipped_otherwise(schedule: PrivacySchedule, ledger: Ledger | LedgerContent | int | None) -> list[str]:
    """Starts of the run with another clipping than is stated: a ledger allows it, as the noise is relative to C."""
    if not isinstance(ledger, LedgerContent):
        return []
    stated, found = json.loads(json.dumps(schedule.to_dict())), []  # as it would be read
    for (_, count), other in zip(ledger.events, ledger.schedules, strict=False):
        if not count or other is None:
            continue
        differ = [f"{name} {other.get(name)}" for name in _CLIPPING if other.get(name) != stated[name]]
        if differ:
            found.append(f"{count} of the releases were clipped with {', '.join(differ)}; epsilon is that of all")
    return found


def _noise_rng(schedule: PrivacySchedule, seed_known: bool) -> str:
    if seed_known:
        return "fixed seed"
    if schedule.secure_rng:
        return (
            "cryptographic (ChaCha20, RFC 8439): a discrete Gaussian on a grid of 2^-25 of its standard deviation, to "
            "which the sum is rounded; the noise is larger by what rounding adds to the sensitivity"
        )
    return "pseudo-random, seeded by the operating system; not cryptographic, open to floating-point attacks"


def _number(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value


def _show(value: Any, none: str = "none") -> str:
    if value is None:
        return none
    return rounded_up(value) if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
