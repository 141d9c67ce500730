"""Several rows for one example: the gradient of their summed loss is clipped, whatever the rows' order and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.errors import ClippingError, PrivacyConfigError
from tests import zoo
from tests.training import Training

C = 0.05  # below the norms of all examples
IDS = {
    "pairs, one half after the other": [0, 1, 2, 0, 1, 2],
    "pairs, next to each other": [0, 0, 1, 1, 2, 2],
    "uneven": [1, 0, 0, 2, 0, 1],
    "one": [0, 0, 0, 0, 0, 0],
    "one row each": [3, 1, 0, 2, 5, 4],
}


def reference(
    entry: zoo.Entry, batch: dict[str, Tensor], ids: list[int], weights: Tensor, mean: bool = False
) -> list[Tensor]:
    """Clipped sum in float64: each row's loss of a forward alone, added up or averaged by example."""
    model = entry.build().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for example in range(max(ids) + 1):
        losses = []
        for row, owner in enumerate(ids):
            if owner == example:
                alone = {name: value[row : row + 1] for name, value in batch.items()}
                losses.append(model(**alone).loss)
        loss = sum(losses) / (len(losses) if mean else 1)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
        for t, g in zip(total, grads, strict=True):
            if g is not None:
                t += g * torch.clamp(C / norm, max=1.0) * weights[example]
    return total


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("order", IDS)
@pytest.mark.parametrize("entry", [zoo.LLAMA, zoo.GPT2], ids=lambda entry: entry.name)
def test_clipped_sum(entry: zoo.Entry, order: str, strategy: str) -> None:
    """GPT-2's embeddings are tied to its head, and its positions are shared by all rows; uneven rows checkpointed."""
    checkpointing = order == "uneven"
    ids = IDS[order]
    batch = zoo.token_batch(6, 9)
    weights = torch.ones(max(ids) + 1)
    weights[-1] = 0.0 if max(ids) else 1.0
    model: Any = entry.build().double()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dpft.wrap(model, max_grad_norm=C, strategy=strategy)  # type: ignore[arg-type]  # mypy takes it for a str
    model(**batch, example_ids=torch.tensor(ids), example_weight=weights).loss.backward()
    expected = reference(entry, batch, ids, weights)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got if got is not None else torch.zeros_like(want), want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("order", ["uneven", "pairs, one half after the other"])
def test_the_mean_of_the_rows(order: str, strategy: str) -> None:
    """With a clip norm between the norms: an example with many rows is not longer than one with few."""
    ids, batch, weights = IDS[order], zoo.token_batch(6, 9), torch.tensor([1.0, 0.0, 1.0])
    model = dpft.wrap(zoo.LLAMA.build().double(), max_grad_norm=C, strategy=strategy)  # type: ignore[arg-type]  # mypy takes it for a str
    given: dict[str, Any] = {**batch, "example_ids": torch.tensor(ids), "row_reduction": "mean"}
    loss = model(**given, example_weight=weights).loss
    loss.backward()
    for p, want in zip(model.parameters(), reference(zoo.LLAMA, batch, ids, weights, mean=True), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-7, atol=1e-10)
    rows = [float(model.eval()(**{k: v[i : i + 1] for k, v in batch.items()}).loss) for i in range(6)]
    means = [sum(rows[i] for i in range(6) if ids[i] == u) / ids.count(u) for u in (0, 2)]
    assert float(loss) == pytest.approx(sum(means) / 2)
    with torch.no_grad():
        assert float(model(**given, example_weight=weights).loss) == pytest.approx(float(loss))


def test_mean_and_sum_of_the_rows_have_other_norms() -> None:
    """By the number of rows: the test above can fail."""
    norms = {}
    for reduction in ("mean", "sum"):
        model = dpft.wrap(zoo.LLAMA.build().double(), max_grad_norm=C)
        ids = torch.tensor(IDS["uneven"])
        model(**zoo.token_batch(6, 9), example_ids=ids, row_reduction=reduction).loss.backward()
        norms[reduction] = dpft.stats(model).norms
    torch.testing.assert_close(norms["sum"], norms["mean"] * torch.tensor([3.0, 2.0, 1.0]), check_dtype=False)


def test_rows_per_example_is_the_same() -> None:
    sums = []
    for extra in ({"rows_per_example": 2}, {"example_ids": torch.tensor([0, 0, 1, 1])}):
        model = dpft.wrap(zoo.LLAMA.build(), max_grad_norm=C)
        loss = model(**zoo.token_batch(4, 9), **extra).loss
        loss.backward()
        sums.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_losses_of_the_caller(strategy: str) -> None:
    """A loss that is no sum over rows: of a pair, as in preference training."""
    batch = {k: v for k, v in zoo.token_batch(6, 9).items() if k != "labels"}
    ids = torch.tensor([0, 1, 2, 0, 1, 2])

    def of_pair(logits: Tensor) -> Tensor:
        return nn.functional.softplus(logits[0].float().logsumexp(-1).mean() - logits[1].float().square().mean())

    model = dpft.wrap(zoo.LLAMA.build().double(), max_grad_norm=C, strategy=strategy)  # type: ignore[arg-type]  # mypy takes it for a str
    logits = model(**batch, example_ids=ids).logits
    dpft.clipped_loss(model, torch.stack([of_pair(logits[[i, i + 3]]) for i in range(3)])).backward()
    plain = zoo.LLAMA.build().double()
    total = [torch.zeros_like(p) for p in plain.parameters()]
    for i in range(3):
        alone = plain(**{k: v[[i, i + 3]] for k, v in batch.items()}).logits
        grads = torch.autograd.grad(of_pair(alone), list(plain.parameters()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for t, g in zip(total, grads, strict=True):
            t += g * torch.clamp(C / norm, max=1.0)
    for p, want in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"example_ids": torch.tensor([0, 0, 1])}, "expected whole numbers of shape"),
        ({"example_ids": torch.tensor([0, 0, 2, 2])}, "each of 0 to U - 1"),
        ({"example_ids": torch.tensor([0, 0, -1, 1])}, "each of 0 to U - 1"),
        ({"example_ids": torch.tensor([0.0, 0.0, 1.0, 1.0])}, "expected whole numbers"),
        ({"rows_per_example": 3}, "divides them"),
        ({"rows_per_example": 2, "row_reduction": "max"}, "expected 'sum' or 'mean'"),
    ],
)
def test_what_does_not_fit_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ClippingError, match=message):
        dpft.wrap(zoo.LLAMA.build())(**zoo.token_batch(4, 9), **extra)


def test_losses_of_rows_are_refused() -> None:
    """One for each row would be several contributions of one example."""
    model = dpft.wrap(zoo.LLAMA.build())
    batch = {k: v for k, v in zoo.token_batch(4, 9).items() if k != "labels"}
    logits = model(**batch, rows_per_example=2).logits
    with pytest.raises(ClippingError, match="one loss for each example"):
        dpft.clipped_loss(model, logits.float().square().mean((1, 2)))


def two_texts(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each item's text, and after all of them each item's text reversed."""
    ids = torch.stack([item["input_ids"] for item in items])
    ids = torch.cat([ids, ids.flip(1)])
    return {"input_ids": ids, "labels": ids.clone(), "example_ids": torch.arange(len(items)).repeat(2)}


def test_a_private_training(tmp_path: Path) -> None:
    """Sampling, padding rows and the guard count examples, not rows."""
    training = Training(tmp_path / "ledger.jsonl", collate_fn=two_texts, static_shapes=True)
    for batch in training.loader:
        assert len(batch["input_ids"]) == 2 * len(batch["example_weight"])
        training.backward(batch)
        assert len(dpft.stats(training.model).norms) == len(batch["example_weight"])
        training.optimizer.step()
        training.optimizer.zero_grad()
    assert training.loader.privacy.steps == training.loader.num_steps
    training.close()


def test_ids_that_are_not_the_items_are_refused(tmp_path: Path) -> None:
    training = Training(
        tmp_path / "ledger.jsonl",
        collate_fn=lambda items: {**two_texts(items), "example_ids": torch.zeros(2 * len(items), dtype=torch.long)},
    )
    with pytest.raises(PrivacyConfigError, match="the item that each row belongs to"):
        for _ in training.loader:
            pass
    training.close()
