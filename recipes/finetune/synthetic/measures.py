"""How synthetic texts compare with private ones: not private. For whoever trains, not for publication.

Each figure stands beside a baseline: the same figure of records that were held out, which the model never saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.materials import pad_token

NGRAM = 13  # words in a row, in common: a near-copy. As in the overlap analysis of GPT-3 (arXiv 2005.14165, app. C)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCALE, MIXTURES = 5.0, 25  # of the divergence frontier: those of Pillutla et al.


def longest_runs(texts: Sequence[str], corpus: Sequence[str]) -> list[int]:
    """The longest run of words that each text has in common with any text of the corpus, in words. Exact.

    Case and white space do not count. An (n+1)-gram is in both only where its n-gram is: from each length to the next
    only the places that are left are looked at.

    Args:
        texts: to look at.
        corpus: to look in.
    """
    numbers: dict[str, int] = {}

    def numbered(some: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        words = [[numbers.setdefault(word, len(numbers)) for word in text.casefold().split()] for text in some]
        lengths = np.array([len(row) for row in words], dtype=np.int64)
        ends = np.repeat(np.cumsum(lengths), lengths)
        return (
            np.array([n for row in words for n in row], dtype=np.int64),
            ends,
            np.repeat(np.arange(len(some)), lengths),
        )

    words_a, ends_a, owner = numbered(texts)
    words_b, ends_b, _ = numbered(corpus)
    longest = np.zeros(len(texts), dtype=np.int64)
    at_a, at_b = np.arange(len(words_a)), np.arange(len(words_b))
    grams_a, grams_b = np.zeros(len(words_a), dtype=np.int64), np.zeros(len(words_b), dtype=np.int64)
    length = 0
    while len(at_a):
        # the n-grams that are left, numbered in both alike, and their next words
        inside_a, inside_b = at_a + length < ends_a[at_a], at_b + length < ends_b[at_b]
        at_a, grams_a, at_b, grams_b = at_a[inside_a], grams_a[inside_a], at_b[inside_b], grams_b[inside_b]
        keys_a = grams_a * len(numbers) + words_a[at_a + length]
        keys_b = grams_b * len(numbers) + words_b[at_b + length]
        common = np.intersect1d(keys_a, keys_b)
        left_a, left_b = np.isin(keys_a, common), np.isin(keys_b, common)
        at_a, at_b = at_a[left_a], at_b[left_b]
        grams_a, grams_b = np.searchsorted(common, keys_a[left_a]), np.searchsorted(common, keys_b[left_b])
        length += 1
        longest[owner[at_a]] = length
    return longest.tolist()


def overlap(texts: Sequence[str], corpus: Sequence[str]) -> dict[str, float]:
    """Figures of the longest runs in common with the corpus, in words; and the share of texts with a long one."""
    runs = np.array(longest_runs(texts, corpus))
    return {
        "median": float(np.median(runs)),
        "0.95 quantile": float(np.quantile(runs, 0.95)),
        "longest": float(runs.max()),
        f"share with {NGRAM} words in a row": float((runs >= NGRAM).mean()),
    }


def total_variation(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Half the L1 distance of two samples' frequencies: 0 (the same) to 1 (nothing in common)."""
    p, q = Counter(one), Counter(other)
    return sum(abs(p[value] / len(one) - q[value] / len(other)) for value in p | q) / 2


def lengths(texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Quantiles of the words of a text, and the total variation from other texts, over tenths of their lengths."""
    found, there = (np.array([len(text.split()) for text in some]) for some in (texts, others))
    edges = np.unique(np.quantile(there, np.linspace(0, 1, 11)[1:-1]))
    tenths, others_tenths = (np.searchsorted(edges, some).tolist() for some in (found, there))
    return {
        f"quantiles {', '.join(map(str, QUANTILES))}": np.quantile(found, QUANTILES).tolist(),
        "total variation": total_variation(tenths, others_tenths),
    }


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, batch_size: int = 32) -> Tensor:
    """The mean of each text's last hidden states, of length 1: ``[texts, width]`` float32 on the CPU.

    Args:
        model: a language model or an encoder of transformers.
        tokenizer: its tokenizer.
        texts: to embed.
        max_tokens: at which a text is cut.
        batch_size: texts at once.
    """
    device, found = next(model.parameters()).device, []
    body = getattr(model, "base_model", model).eval()
    pad = pad_token(tokenizer)
    for start in range(0, len(texts), batch_size):
        rows = [
            tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] or [pad]
            for text in texts[start : start + batch_size]
        ]
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[:, :, None]
        found.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1).cpu())
    return torch.cat(found)


def clusters(points: Tensor, number: int, seed: int, rounds: int = 50) -> Tensor:
    """The cluster of each point ``[points, width]``, int64: Lloyd's k-means from k-means++."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    nearest = torch.cdist(points, centres).squeeze(1) ** 2
    for _ in range(1, number):
        if not nearest.any():  # fewer different points than clusters
            break
        chosen = points[torch.multinomial(nearest, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, torch.cdist(points, chosen).squeeze(1) ** 2)
    owner = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        counts = torch.zeros(len(centres)).index_add(0, owner, torch.ones(len(points)))
        sums = torch.zeros_like(centres).index_add(0, owner, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        again = torch.cdist(points, centres).argmin(1)
        if torch.equal(again, owner):
            break
        owner = again
    return owner


def frontier_area(p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two distributions over clusters: the area under their divergence frontier, 1 where they are the same.

    Pillutla et al. 2021 (arXiv 2102.01454), eq. 2: the curve of ``exp(-c KL(q | r))`` over ``exp(-c KL(p | r))`` for
    the mixtures ``r`` of both, c = 5.
    """
    points = [(0.0, 1.0), (1.0, 0.0)]
    for share in np.linspace(1e-6, 1 - 1e-6, MIXTURES):
        mixture = share * p + (1 - share) * q
        points.append((float(np.exp(-SCALE * _kl(q, mixture))), float(np.exp(-SCALE * _kl(p, mixture)))))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def distance(one: Tensor, other: Tensor, seed: int = 0) -> float:
    """MAUVE-like similarity of two samples of embeddings ``[texts, width]``: 1 for the same, towards 0 for others.

    Both are cut to the smaller one's size, on which the figure depends; a tenth as many clusters as texts. Without
    MAUVE's principal components, and of embeddings of this model: comparable only within one file.
    """
    size = min(len(one), len(other))
    both = torch.cat([one[:size], other[:size]])
    number = max(2, size // 10)
    owner = clusters(both, number, seed)
    p, q = (np.bincount(part.numpy(), minlength=number) / size for part in (owner[:size], owner[size:]))
    return frontier_area(p, q)
