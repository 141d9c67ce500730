"""``dpft account``: what was spent on a set of records, by all trainings and queries together."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from dpft.privacy.account.account import Account
from dpft.privacy.mechanism import AdjacencyName, UnitName


def add_to(commands: Any) -> None:
    """Add the command and its actions."""
    parser = commands.add_parser("account", help="what all trainings and queries on the same records spent together")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("show", help="budget, what is spent or reserved, and by what")
    action.add_argument("path", help="the account's file")
    action.add_argument("--json", action="store_true", help="as JSON")
    action.set_defaults(run=show)

    action = actions.add_parser("settle", help="free what trainings that died had reserved and did not release")
    action.add_argument("path", help="the account's file")
    action.set_defaults(run=settle)

    action = actions.add_parser("create", help="a new account")
    action.add_argument("path", help="the account's file, which must not exist")
    action.add_argument("--epsilon", type=float, required=True, help="the budget")
    action.add_argument("--delta", type=float, required=True, help="well below 1 / number of records")
    action.add_argument(
        "--composition",
        choices=("rdp", "pld"),
        default="rdp",
        help="rdp (default): uses may be chosen by earlier results; pld: tighter, all are fixed beforehand",
    )
    names = get_args(AdjacencyName)
    action.add_argument("--adjacency", choices=names, default=names[0], help="which datasets are neighbours")
    action.add_argument("--unit", choices=get_args(UnitName), default="example", help="whom it protects")
    action.add_argument("--examples-per-user", type=int, help="unit user: of uses that count single rows", metavar="K")
    action.add_argument("--records", default="", help="which records these are, in words", metavar="TEXT")
    action.set_defaults(run=create)


def show(args: argparse.Namespace) -> str:
    """The statement."""
    account = Account.open(args.path)
    return json.dumps(account.statement(), indent=1) if args.json else account.markdown().rstrip()


def settle(args: argparse.Namespace) -> str:
    """What was settled."""
    account = Account.open(args.path)
    settled = account.settle()
    pending = sum(entry.open for entry in account.entries())
    return "\n".join([*(f"settled {name}" for name in settled), f"{pending} reservations are open"])


def create(args: argparse.Namespace) -> str:
    """The new account."""
    account = Account.create(
        args.path,
        epsilon=args.epsilon,
        delta=args.delta,
        composition=args.composition,
        adjacency=args.adjacency,
        unit=args.unit,
        examples_per_user=args.examples_per_user,
        records=args.records,
    )
    return (
        f"account {account.account_id}: epsilon {account.epsilon:g} at delta {account.delta:g}, {account.composition}"
    )
