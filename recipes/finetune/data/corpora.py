"""Texts that need no network: real docstrings of the standard library, and synthetic support tickets.

Docstrings are real English that every Python carries; they play the private data, one docstring one example. The
tickets are **synthetic**, made from templates, and say so in every record: they exist for what docstrings lack, a
``customer_id`` for a privacy unit of several records, and canaries whose memorisation can be measured.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, what is not part of the library proper, and encodings (generated tables with hardly a docstring). pydoc_data
# is the base model's public training text.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip"}
    | {"encodings", "pydoc_data", "__pycache__"}
)
BRANCHES = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def _documented(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of every class and function in a list of statements."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                yield name, text
            yield from _documented(node.body, name)
        elif isinstance(node, BRANCHES):  # a definition under "if sys.platform" or "try: import" counts too
            for field in ("body", "orelse", "finalbody"):
                yield from _documented(getattr(node, field, []), prefix)
            for handler in getattr(node, "handlers", []):
                yield from _documented(handler.body, prefix)


def _sources(root: Path) -> list[Path]:
    """The library's modules. A folder is left out before it is entered: site-packages may hold 50,000 files."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def stdlib_docstrings(min_chars: int = 80, stdlib: Path | None = None) -> list[dict[str, str]]:
    """Collect the docstrings of the standard library by reading its source, without importing any of it.

    Args:
        min_chars: docstrings of this many characters or fewer are left out.
        stdlib: folder to read; the running Python's own if None.

    Returns:
        Records with ``name`` (qualified) and ``text``, in the order of the names, each text once: a text that occurs
        several times (differing at most in white space) is kept under the first name, so that one text is one
        example and cannot be in training and validation at once. Some 3,900 for Python 3.11, in about two seconds.

    Raises:
        FileNotFoundError: the folder holds no source (an embedded or zipped Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    found: dict[str, str] = {}
    for path in _sources(root):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a file for another version: not a module of this Python
            continue
        text = ast.get_docstring(tree)
        for name, docstring in [(module, text or ""), *_documented(tree.body, module)]:
            if len(docstring) > min_chars:
                found.setdefault(name, docstring)
    if not found:
        raise FileNotFoundError(
            f"no docstrings longer than {min_chars} characters under {str(root)!r}; expected the source of Python's "
            "standard library. Use --dataset with a text of your own, or --dataset tickets."
        )
    seen: set[str] = set()
    records = []
    for name in sorted(found):
        key = " ".join(found[name].split())
        if key not in seen:
            seen.add(key)
            records.append({"name": name, "text": found[name]})
    return records


def in_validation(key: str, share: float = 0.1) -> bool:
    """Whether a record belongs to validation: by a hash of its key, so that it never changes sides.

    Args:
        key: what names the record, such as the qualified name or the customer.
        share: share of the keys that are validation, in [0, 1].
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


PRODUCTS = ("the tablet", "my router", "the headset", "our printer", "the thermostat", "the camera", "my watch")
TROUBLES = ("will not start", "loses its connection", "shows error {code}", "arrived with a crack", "keeps restarting")
WISHES = ("Please send a replacement.", "I want my money back.", "Can somebody call me?", "How do I repair it?")
OPENINGS = ("Hello,", "Good morning,", "Dear support,", "Hi there,", "To whom it may concern,")


def synthetic_tickets(
    customers: int = 1000, seed: int = 0, canaries: int = 8, canary_repeats: int = 1
) -> list[dict[str, str | bool]]:
    """Make support tickets from templates: **synthetic**, seeded, with a privacy unit of several records.

    Args:
        customers: number of customers, each with one to eight tickets.
        seed: seed of everything that is drawn.
        canaries: number of tickets with a random secret code, for measuring what a model memorises.
        canary_repeats: how many copies of each canary are in the data, under the same customer.

    Returns:
        Records with ``customer_id`` (the privacy unit), ``ticket_id``, ``text``, ``canary`` (the secret, or an empty
        string) and ``synthetic`` (always true).
    """
    draw = random.Random(seed)
    records: list[dict[str, str | bool]] = []

    def add(customer: str, text: str, canary: str = "") -> None:
        ticket = f"T{len(records):06d}"
        records.append(
            {"customer_id": customer, "ticket_id": ticket, "text": text, "canary": canary, "synthetic": True}
        )

    names = [f"C{number:05d}" for number in range(customers)]
    for customer in names:
        for _ in range(min(8, 1 + int(draw.expovariate(0.5)))):
            trouble = draw.choice(TROUBLES).format(code=draw.randint(100, 999))
            add(
                customer,
                f"{draw.choice(OPENINGS)} {draw.choice(PRODUCTS)} that I bought {draw.randint(2, 60)} days ago "
                f"{trouble}. My order is {draw.randint(10**7, 10**8 - 1)}. {draw.choice(WISHES)}",
            )
    for _ in range(canaries):
        secret = "".join(draw.choice("0123456789") for _ in range(12))
        customer = draw.choice(names)
        for _ in range(canary_repeats):
            add(customer, f"Dear support, my secret code is {secret}. Please keep it to yourselves.", secret)
    return records
