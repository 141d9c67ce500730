"""Losses that a forward computes: caught where it is certain what is whose, refused everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpft
from dpft.clipping.deferred_checks import DeferredChecks
from dpft.models.losses import ExampleLosses, PerExampleLosses
from dpft.models.targets import TargetRows

B, T, C = 3, 4, 5
Loss = Callable[[Tensor, Tensor], Any]


class Tagger(nn.Module):
    """Logits ``[B, T, C]``, and whatever loss a test wants."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(6, C), loss

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.layer(x)
        return SimpleNamespace(loss=None if labels is None else self.loss(logits, labels), logits=logits)


def flat(logits: Tensor, labels: Tensor, **more: Any) -> Any:
    return F.cross_entropy(logits.view(-1, C), labels.view(-1), **more)


def batch(examples: int = B) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, C, (examples, T), generator=g)
    labels[0, 1] = labels[-1, 2] = labels[-1, 3] = -100
    return torch.randn(examples, T, 6, generator=g), labels


def alone(loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([loss(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


def caught(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """The losses ``[B]`` of ``loss`` while it is caught."""
    with PerExampleLosses({"labels": labels}, len(labels), DeferredChecks()):
        found = loss(logits, labels)
    assert isinstance(found, ExampleLosses)
    return found.losses


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
TOKEN_LOSSES: dict[str, Loss] = {
    "mean": flat,
    "sum": lambda x, y: flat(x, y, reduction="sum"),
    "class weights": lambda x, y: flat(x, y, weight=WEIGHT),
    "label smoothing": lambda x, y: flat(x, y, label_smoothing=0.2),
    "smoothing and weights": lambda x, y: flat(x, y, label_smoothing=0.2, weight=WEIGHT),
    "another ignored index": lambda x, y: flat(x, y.masked_fill(y == -100, 2), ignore_index=2),
    "channels in front": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "log-likelihood": lambda x, y: F.nll_loss(x.log_softmax(-1).view(-1, C), y.view(-1), weight=WEIGHT),
    "shifted": lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, C), y[:, 1:].reshape(-1)),
    "shifted and padded": lambda x, y: flat(x, F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()),
    "a module": lambda x, y: nn.CrossEntropyLoss()(x.flatten(0, 1), y.flatten().to("cpu").long()),
    "masked": lambda x, y: flat(x, torch.where(y.view(-1) > 0, y.view(-1), torch.tensor(-100))),
    "two, weighted": lambda x, y: (flat(x, y) + 0.3 * flat(2 * x, y)) / 2 - 1,
    "from zero": lambda x, y: sum([flat(x, y), -flat(x, y) * 0.25]).to(x.device),
}
NUMBER_LOSSES: dict[str, Loss] = {
    "squares": lambda x, y: F.mse_loss(x, y),
    "squares, flat": lambda x, y: nn.MSELoss()(x.view(-1), y.view(-1)),
    "swapped": lambda x, y: F.mse_loss(y, x),
    "distances": lambda x, y: F.l1_loss(x, y),
    "smooth": lambda x, y: F.smooth_l1_loss(x, y, beta=0.5),
    "huber": lambda x, y: F.huber_loss(x, y, delta=0.5),
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, y.clamp(0, 1), pos_weight=WEIGHT),
    "binary, sum": lambda x, y: F.binary_cross_entropy_with_logits(x, y.clamp(0, 1), weight=WEIGHT, reduction="sum"),
    "probabilities": lambda x, y: F.cross_entropy(x.view(-1, C), y.view(-1, C), weight=WEIGHT, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_of_tokens(name: str) -> None:
    logits, labels = batch()
    logits = logits[..., :C]
    torch.testing.assert_close(
        caught(TOKEN_LOSSES[name], logits, labels), alone(TOKEN_LOSSES[name], logits, labels), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_of_numbers(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(B, T, C, generator=g), torch.randn(B, T, C, generator=g)
    torch.testing.assert_close(
        caught(NUMBER_LOSSES[name], x, y), alone(NUMBER_LOSSES[name], x, y), rtol=1e-6, atol=1e-6
    )


def chosen(logits: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(logits[labels != -100], labels[labels != -100])


REFUSED: dict[str, tuple[Loss, str]] = {
    "a selection of tokens": (chosen, "a selection of tokens"),
    "rows in another order": (lambda x, y: flat(x.flip(0), y.flip(0)), "a selection of tokens"),
    "time in front": (lambda x, y: flat(x.transpose(0, 1).reshape(-1, C), y.t().reshape(-1)), "a selection of tokens"),
    "transposed in place": (lambda x, y: F.cross_entropy(x.mT, y.clone().t_().t_()), "a selection of tokens"),
    "other examples left out": (lambda x, y: flat(x[1:].reshape(-1, C), y[1:]), "a selection of tokens"),
    "sorted": (lambda x, y: flat(x, y.sort(0).values), "a selection of tokens"),
    "a similarity": (lambda x, y: F.cross_entropy(x[:, 0] @ x[:, 0].T, torch.arange(len(x))), "a selection of tokens"),
    "targets that are broadcast": (lambda x, y: F.mse_loss(x[..., :1], y.float()), "are compared with targets"),
    "weights of elements": (
        lambda x, y: F.binary_cross_entropy_with_logits(x[..., 0], y.float().clamp(0, 1), weight=y.float()),
        "a weight for each element",
    ),
    "old arguments": (lambda x, y: flat(x, y, size_average=True), "size_average"),
    "a mean": (lambda x, y: flat(x, y).mean(), "used its loss in mean"),
    "an auxiliary term": (lambda x, y: flat(x, y) + 0.1 * x.square().mean(), "add with a tensor"),
    "an auxiliary term in front": (lambda x, y: 0.1 * x.square().mean() + flat(x, y), "used its loss in"),
    "a stack": (lambda x, y: torch.stack([flat(x, y), flat(x, y)]).sum(), "used its loss in stack"),
    "a condition": (lambda x, y: flat(x, y) if flat(x, y) > 0 else 0, "used its loss in gt"),
    "a number": (lambda x, y: flat(x, y) * float(flat(x, y)), "used its loss in float"),
    "a loss without reduction": (lambda x, y: flat(x, y, reduction="none").mean(), "computed its own loss"),
    "another loss": (lambda x, y: F.multi_margin_loss(x[:, 0], y[:, 0].clamp(0, 4)), "computed its own loss"),
}


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, strategy: str) -> None:
    loss, why = REFUSED[name]
    x, labels = batch()
    model = dpft.wrap(Tagger(loss), strategy=strategy)
    with pytest.raises(dpft.ClippingError, match=why) as error:
        model(x=x, labels=labels)
    assert "per_example" in str(error.value) and "physical batches of one" in str(error.value)
    model(x=x[:1], labels=labels[:1])  # the way out that the message names


def test_a_selection_that_fits_by_luck_is_refused() -> None:
    """Four of six tokens: as many as without the first of each row, and of the same values; three are example 0's."""
    labels, keep = torch.zeros(2, 3).long(), torch.tensor([[True, True, True], [True, False, False]])
    assert torch.equal(labels[keep], labels[:, 1:].flatten())
    model = dpft.wrap(Tagger(lambda x, y: F.cross_entropy(x[keep], y[keep])), isolation="off")
    with pytest.raises(dpft.ClippingError, match="a selection of tokens"):
        model(x=torch.randn(2, 3, 6), labels=labels)


def test_a_total_that_begins_with_zero() -> None:
    """MusicGen's: a sum over codebooks, by an augmented assignment."""

    def summed(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros([])
        for shift in (0.0, 1.0):
            total += flat(x + shift * x.square(), y)
        return total / 2

    x, labels = batch()
    model = dpft.wrap(Tagger(summed))
    model(x=x, labels=labels).loss.backward()
    with torch.no_grad():
        alone = torch.stack([model(x=x[i : i + 1], labels=labels[i : i + 1]).loss for i in range(len(x))])
    torch.testing.assert_close(model(x=x, labels=labels).loss, alone.mean())


def test_labels_by_position_are_refused() -> None:
    x, labels = batch()
    with pytest.raises(dpft.ClippingError, match="by keyword"):
        dpft.wrap(Tagger(flat))(x, labels)


def gathered(labels: Tensor, index: Tensor) -> bool:
    """Whether what is gathered is known to be whose it is."""
    rows = TargetRows({"labels": labels}, len(labels), DeferredChecks())
    out = torch.gather(labels, 0, index)
    rows.follow(torch.gather, (labels, 0, index), {}, out)
    return out in rows


def test_gathering_every_label_in_order() -> None:
    """As the head of DeBERTa does; that it is in order is checked by value."""
    labels = torch.tensor([4, 4, 4])
    assert gathered(labels, torch.tensor([0, 1, 2]))
    assert not gathered(labels, torch.tensor([0, 2]))
    for moved in ([0, 2, 1], [0, 0, 2]):
        with pytest.raises(dpft.ClippingError, match="reorders"):
            gathered(labels, torch.tensor(moved))


def test_what_is_derived_from_targets() -> None:
    labels = torch.arange(12).view(3, 4)

    def known(*steps: Callable[[Tensor], Any]) -> bool:
        mode = PerExampleLosses({"labels": labels}, 3, DeferredChecks())
        value: Any = labels
        with mode:
            for step in steps:
                value = step(value)
        return value in mode._rows

    assert known(lambda t: t.view(-1), lambda t: t.unsqueeze(1), lambda t: t.squeeze())
    assert known(lambda t: t[:, 1:], lambda t: t[:, 0])
    assert known(lambda t: t[..., :-1], lambda t: t.reshape(-1))
    assert known(lambda t: t.unsqueeze(-1), lambda t: t[:, 1, ...])
    assert not known(lambda t: t.view(-1), lambda t: t[3:])
    assert not known(lambda t: t[1:])
    assert not known(lambda t: t[:, torch.tensor([0, 1])])
    assert not known(lambda t: t[..., 1:, :])
    assert not known(lambda t: F.pad(t, (0, 0, 0, 1)))
    assert not known(lambda t: F.pad(t.view(-1), (0, 3)))
    assert not known(lambda t: t.t())
    assert not known(lambda t: t[:, 0], lambda t: t.expand(3, 3))
    assert not known(lambda t: t.flip(0))
    assert not known(lambda t: t.roll(1, 0))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_arguments_that_only_sound_like_targets(strategy: str) -> None:
    """No loss: the caller has it, as without them."""
    x, labels = batch()
    model = dpft.wrap(Tagger(flat), strategy=strategy)
    out = model(x=x, box_labels=labels)
    assert out.loss is None and out.logits.shape == (B, T, C)
    if strategy != "per_example":
        dpft.clipped_loss(model, out.logits.square().mean((1, 2))).backward()


def test_the_stand_in_has_no_other_attributes() -> None:
    losses = ExampleLosses(torch.ones(3))
    assert losses.float() is losses and losses.device.type == "cpu" and losses.dtype == torch.float32
    assert not hasattr(losses, "no such thing")
    with pytest.raises(dpft.ClippingError, match="backward"):
        losses.backward()
    with pytest.raises(dpft.ClippingError, match="add with a str"):
        losses + "1"
