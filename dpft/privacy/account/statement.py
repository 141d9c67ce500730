"""The statement of an account, in words."""

from __future__ import annotations

from typing import Any

from dpft.privacy.account.events import Protects, Release, described
from dpft.privacy.account.file import Entry
from dpft.privacy.accounting.accountant import rounded_up
from dpft.privacy.mechanism import Mechanism
from dpft.privacy.report import _ADJACENCY

_GUARANTEE = {
    "rdp": "a Renyi filter of the fixed order {order:g} (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 3.1): it "
    "holds however each use was chosen by the results of earlier ones",
    "pld": "composition of privacy loss distributions: it holds if no use, and no decision to end one early, was "
    "chosen by results of earlier ones on these records",
}


def stated(protects: Protects, composition: str, order: float | None) -> dict[str, Any]:
    """What an account guarantees, and to whom."""
    unit, most = protects.unit, protects.examples_per_user
    words = {"example": unit, "user": "user, all records of one together"}[unit]
    return {
        "guarantee": _GUARANTEE[composition].format(order=order),
        "adjacency": protects.adjacency,
        "neighbours": _ADJACENCY[protects.adjacency].format(unit=unit),
        "unit": words if most is None else f"user, at most {most} examples each",
    }


def stated_use(entry: Entry) -> dict[str, Any]:
    """One use."""

    def words(release: Release) -> str:
        of_users = entry.item == "user" and isinstance(release, Mechanism) and release.unit == "example"
        return described(release) + ", a user is one example" * of_users

    return {
        "name": entry.name,
        "what": entry.what,
        "state": "reserved, counted in full" if entry.open else "finished",
        "time": entry.time,
        "releases": [f"{count} x {words(release)}" for release, count in entry.uses],
    }


def account_markdown(said: dict[str, Any]) -> str:
    """A section of a model card from :meth:`Account.statement`, beginning with a heading of level two."""
    claim = (
        f"Everything below together satisfies ({rounded_up(said['epsilon'])}, {said['delta']:g})-differential "
        f"privacy, where neighbouring datasets are those in which {said['neighbours']}, by {said['guarantee']}."
    )
    if said["exceeded"]:
        claim = "**The budget was exceeded: no guarantee of it holds.** What was released is below."
    rows = [
        ("Records", said["records"] or "not described"),
        ("Budget", f"epsilon {said['epsilon']:g} at delta {said['delta']:g}"),
        ("Spent or reserved", f"epsilon {rounded_up(said['epsilon_spent'])}, if all of it was fixed beforehand"),
        ("Privacy unit", said["unit"]),
        ("Adjacency", said["adjacency"]),
        ("Account", said["account"]),
    ]
    lines = ["## Privacy account", "", claim, "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    lines += ["| use | state | releases |", "|---|---|---|"]
    lines += [f"| {use['what']} | {use['state']} | {'; '.join(use['releases']) or 'none'} |" for use in said["uses"]]
    return "\n".join(lines) + "\n"
