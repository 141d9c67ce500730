"""A private training of which every example is a canary, in a coordinate of its own: thousands of trials in one run.

The model is a table of one number per canary (or several tables), and a canary's loss is its number times a constant,
or times 0 for those that are not there. So a canary's gradient is that of no other, is the same at every step, and is
clipped to the clip norm. The noise of different coordinates is independent and so are, under the samplers that
are audited like this, the draws of different canaries: each is a trial of its own. What makes the training private is
not touched: ``dpft.prepare``, its sampler, its clipping, its noise and its ledger.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import dpft

Numbers = npt.NDArray[np.float64]
PUSH = 10.0  # the norm of a canary's gradient, over the clip norm


class Table(nn.Module):
    """One number per canary in each of several tables; their sum is what a canary's loss is proportional to."""

    def __init__(self, canaries: int, tables: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Embedding(canaries, 1) for _ in range(tables))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, canary: Tensor) -> Tensor:
        """``[B, 1]`` whole numbers -> ``[B]``."""
        return torch.stack([part(canary)[:, 0, 0] for part in self.parts]).sum(0)


class Rows:
    """The records: ``rows`` of each canary, one after the other."""

    def __init__(self, present: npt.NDArray[np.bool_], rows: int) -> None:
        self.present, self.rows = present.tolist(), rows

    def __len__(self) -> int:
        return len(self.present) * self.rows

    def __getitem__(self, index: int) -> tuple[int, float]:
        if not 0 <= index < len(self):
            raise IndexError
        canary = index // self.rows
        return canary, PUSH * self.present[canary]


def collate(items: list[tuple[int, float]]) -> dict[str, Tensor]:
    """Canaries ``[B, 1]`` and what their losses are multiplied by ``[B]``."""
    canaries, pushes = zip(*items, strict=True)
    return {"canary": torch.tensor(canaries)[:, None], "push": torch.tensor(pushes)}


@dataclass(frozen=True)
class Released:
    """What a training released.

    Attributes:
        rows: ``[canaries, steps]``, the released sums, each canary's own coordinates added up, over the clip norm:
            what a participation adds is 1.
        present: which canaries were there, by independent fair coins.
        schedule: what is claimed.
    """

    rows: Numbers
    present: npt.NDArray[np.bool_]
    schedule: dpft.PrivacySchedule


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Only counting needs so large a delta; the theorems hold for it like for any other.
        warnings.filterwarnings("ignore", "target_delta")
        yield


def train(
    privacy: dpft.PrivacyConfig,
    canaries: int,
    seed: int,
    *,
    tables: int = 1,
    rows: int = 1,
    users: int | None = None,
    account: dpft.Account | None = None,
    physical: int = 2048,
) -> Released:
    """One private training.

    Args:
        privacy: of it; ``num_steps`` is the number of releases.
        canaries: some thousands.
        seed: of the coins; nothing else is seeded.
        tables: in which a canary has a coordinate.
        rows: records of each canary.
        users: names of a canary in :func:`dpft.by_user`, each with an equal part of its rows; None: rows are examples.
        account: that the training pays from.
        physical: rows of a physical batch.
    """
    from accelerate import Accelerator

    present = np.random.default_rng(seed).random(canaries) < 0.5
    dataset: Any = Rows(present, rows)
    if users is not None:
        dataset = dpft.by_user(dataset, [i * users // rows for i in range(len(dataset))], rows=max(1, rows // users))
    model = Table(canaries, tables)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    releases: list[Tensor] = []
    with tempfile.TemporaryDirectory(prefix="dpft-audit-") as scratch, _quiet():
        wrapped, optimizer, loader = dpft.prepare(
            (accelerator := Accelerator(cpu=True)),
            model,
            sgd,
            dataset,
            privacy,
            collate_fn=collate,
            max_physical_batch_size=physical,
            ledger_path=Path(scratch) / "ledger.jsonl",
            account=account,
        )
        try:
            before = _values(model)
            for batch in loader:
                several = {name: batch[name] for name in ("example_ids", "row_reduction") if name in batch}
                losses = wrapped(batch["canary"], **several) * batch["push"]
                if several:  # of users: the mean over a user's rows
                    losses = _means(losses, several["example_ids"], len(batch["example_weight"]))
                accelerator.backward(dpft.clipped_loss(wrapped, losses, batch["example_weight"]))
                optimizer.step()
                optimizer.zero_grad()
                if loader.is_last:
                    after = _values(model)
                    releases.append(before - after)
                    before = after
            schedule = loader.privacy.schedule
        finally:
            loader.privacy.close()
    scale = float(schedule.expected_batch_size) / schedule.max_grad_norm
    return Released(torch.stack(releases, dim=1).numpy() * scale, present, schedule)


def _means(losses: Tensor, owners: Tensor, count: int) -> Tensor:
    """``[R]`` -> ``[count]``: the mean of the losses of each owner."""
    sums, rows = (torch.zeros(count).index_add(0, owners, values) for values in (losses, torch.ones_like(losses)))
    return sums / rows


def _values(model: Table) -> Tensor:
    """The canaries' numbers, of all tables in equal parts, float64 ``[canaries]``."""
    parts = torch.stack([part.weight.detach().double()[:, 0] for part in model.parts])  # type: ignore[operator]  # embeddings
    return parts.sum(0) / len(parts) ** 0.5
