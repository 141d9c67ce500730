"""Which generated texts are kept. By the synthetic texts alone: post-processing, which spends no budget.

A check that looked at a private record, such as "drop what is in the training data", would be none of that: it would
tell which records there are.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE = 3  # words
HASHES, BANDS = 64, 16
PRIME = 2**31 - 1


@dataclass(frozen=True)
class Rules:
    """What a text must be like.

    Attributes:
        columns: of the header, which a text must not repeat.
        min_chars: fewest characters.
        max_chars: most characters; None: no bound.
        form: ``text``, or ``json``: it parses.
        must_match: regular expression, which must be found in it.
        near: similarity from which on a text counts as a copy of an earlier one; 1: only exact copies do.
    """

    columns: tuple[str, ...]
    min_chars: int = 1
    max_chars: int | None = None
    form: str = "text"
    must_match: str | None = None
    near: float = 0.8

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.near <= 1:
            raise ValueError(f"--near-duplicates is {self.near:g}; expected a similarity above 0, at most 1 (exact).")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"--max-chars {self.max_chars} is below --min-chars {self.min_chars}.")
        try:
            re.compile(self.must_match or "")
        except re.error as error:
            raise ValueError(f"--must-match {self.must_match!r} is no regular expression: {error}.") from None


def check(texts: Sequence[str], rules: Rules) -> tuple[list[int], dict[str, int]]:
    """Positions of the texts to keep, and how many were rejected, by the first reason that was found.

    Args:
        texts: without their headers.
        rules: what is kept.
    """
    tests = format_tests(rules)
    rejected: Counter[str] = Counter()
    sound = []
    for i, text in enumerate(texts):
        reason = next((reason for reason, fails in tests.items() if fails(text)), None)
        if reason is None:
            sound.append(i)
        else:
            rejected[reason] += 1
    unlike = [sound[i] for i in first_of_copies([texts[i] for i in sound])]
    rejected["a copy of another one"] += len(sound) - len(unlike)
    kept = [unlike[i] for i in first_of_similar([texts[i] for i in unlike], rules.near)]
    rejected["nearly a copy of another one"] += len(unlike) - len(kept)
    return kept, {reason: count for reason, count in rejected.items() if count}


def format_tests(rules: Rules) -> dict[str, Callable[[str], bool]]:
    """Reason to a function that says whether a text is rejected for it."""
    header = re.compile("|".join(rf"(?:^|\| ){re.escape(column)}: " for column in rules.columns), re.MULTILINE)
    pattern = re.compile(rules.must_match) if rules.must_match else None
    return {
        "no valid text": lambda text: not valid(text),
        "too short": lambda text: len(text.strip()) < rules.min_chars,
        "too long": lambda text: rules.max_chars is not None and len(text.strip()) > rules.max_chars,
        "repeats the header": lambda text: bool(header.search(text)),
        "not JSON": lambda text: rules.form == "json" and not _parses(text),
        "does not match": lambda text: pattern is not None and not pattern.search(text),
    }


def valid(text: str) -> bool:
    """No replacement character (bytes that are no UTF-8), no surrogate, no control character but white space."""
    return not any(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r") for c in text)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def normalised(text: str) -> str:
    """For comparison: case and white space do not count."""
    return " ".join(text.casefold().split())


def first_of_copies(texts: Sequence[str]) -> list[int]:
    """The position of the first of each set of equal texts, after normalisation."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(normalised(text), i)
    return list(first.values())


def first_of_similar(texts: Sequence[str], near: float) -> list[int]:
    """The positions of texts that are not similar to an earlier one that is kept.

    Similarity is Jaccard's, of the sets of word triples. Candidates come from MinHash (Broder 1997) in 16 bands of 4
    hashes, and are compared exactly: nothing below ``near`` is dropped, and a pair of similarity 0.8 is missed with
    probability 2e-4.

    Args:
        texts: to compare.
        near: from this similarity on a text is dropped; 1 drops nothing here.
    """
    if near >= 1:
        return list(range(len(texts)))
    draw = np.random.default_rng(0)
    factors, offsets = draw.integers(1, PRIME, (HASHES, 1)), draw.integers(0, PRIME, (HASHES, 1))
    numbers: dict[tuple[str, ...], int] = {}
    kept: dict[int, set[int]] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for i, text in enumerate(texts):
        words = normalised(text).split()
        # a text of fewer words is one shingle
        shingles = {
            numbers.setdefault(tuple(words[at : at + SHINGLE]), len(numbers))
            for at in range(max(1, len(words) - SHINGLE + 1))
        }
        # below 2**62: factors, numbers and the prime are below 2**31
        hashes = ((factors * np.array(sorted(shingles), dtype=np.int64) + offsets) % PRIME).min(axis=1)
        bands = [(band, part.tobytes()) for band, part in enumerate(hashes.reshape(BANDS, -1))]
        candidates = {other for key in bands for other in buckets.get(key, ())}
        if any(_jaccard(shingles, kept[other]) >= near for other in candidates):
            continue
        kept[i] = shingles
        for key in bands:
            buckets.setdefault(key, []).append(i)
    return list(kept)


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
