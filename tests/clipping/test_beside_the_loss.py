"""What comes beside the clipped losses, more than once, or not as a row of a tensor: refused, never added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

import dpft
from accelerate import Accelerator
from tests import zoo
from tests.clipping import against_oracle

STRATEGIES = ["one_pass", "two_pass", "per_example"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def losses_of(model: Any, x: Tensor, strategy: str) -> Any:
    if strategy == "per_example":
        return [model(x[i : i + 1])[0].square().sum() for i in range(len(x))]
    return model(x).square().sum(1)


def released(model: nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def other_forward(model: Any, x: Tensor) -> Tensor:
    return 1000 * model(x).square().mean()


def functional_use(model: Any, x: Tensor) -> Tensor:
    return 1000 * F.linear(x, model[0].weight).square().mean()


def a_penalty(model: Any, x: Tensor) -> Tensor:
    return 1e-2 * model[2].weight.square().sum()


@pytest.mark.parametrize("term", [other_forward, functional_use, a_penalty])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_term_beside_the_clipped_losses(strategy: Any, term: Any) -> None:
    """Autograd adds it to the clipped sum before the parameter sees either."""
    model, x = dpft.wrap(mlp(), strategy=strategy), inputs(2)
    loss = dpft.clipped_loss(model, losses_of(model, x, strategy))
    with pytest.raises(dpft.ClippingError):
        (loss + term(model, x)).backward()
    assert all(p.grad is None for p in model[0].parameters()) or released(model) <= 2 * (1 + 1e-6)


@pytest.mark.parametrize("strategy", ["one_pass", "per_example"])
def test_a_backward_that_stops_early_lets_no_other_pass(strategy: Any) -> None:
    model, x = dpft.wrap(mlp(), strategy=strategy), inputs(2)
    loss = dpft.clipped_loss(model, losses_of(model, x, strategy))
    loss.backward(inputs=[model[2].weight, model[2].bias])
    with pytest.raises(dpft.ClippingError):
        functional_use(model, x).backward()
    model.zero_grad()
    dpft.clipped_loss(model, losses_of(model, x, strategy)).backward(inputs=[model[2].weight])
    loss = dpft.clipped_loss(model, losses_of(model, x, strategy))
    with pytest.raises(dpft.ClippingError):
        (loss + functional_use(model, x)).backward()
    assert released(model) <= 4 * (1 + 1e-6)


@pytest.mark.parametrize("when", ["before wrap", "after wrap", "after the forward"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_hook_on_a_parameter(strategy: Any, when: str) -> None:
    model, x = mlp(), inputs(2)

    def hook(at: str) -> None:
        if at == when:
            model[0].weight.register_hook(lambda grad: 10 * grad)

    hook("before wrap")
    dpft.wrap(model, strategy=strategy)
    hook("after wrap")
    losses = losses_of(model, x, strategy)
    hook("after the forward")
    with pytest.raises(dpft.ClippingError, match=r"'0\.weight' has a gradient hook besides dpft's"):
        dpft.clipped_loss(model, losses).backward()
    assert model[0].weight.grad is None


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": inputs(6)[i]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_example_with_several_losses(strategy: Any, tmp_path: Path) -> None:
    """Each would be clipped to C by itself, and the example contribute several times C."""
    accelerator, model = Accelerator(cpu=True), mlp()
    config = dpft.PrivacyConfig(
        noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=6, sample_rate=1.0, num_steps=1, target_delta=1e-5
    )
    model, optimizer, loader = dpft.prepare(
        accelerator, model, torch.optim.SGD(model.parameters(), 1.0), Rows(), config,
        max_physical_batch_size=6, strategy=strategy, ledger_path=tmp_path / "ledger.jsonl",
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpft.ClippingError, match="18 losses were clipped of a physical batch of 6 rows"):
        for batch in loader:
            losses = losses_of(model, batch["x"].repeat(3, 1), strategy)
            dpft.clipped_loss(model, losses).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


class TakesLists(nn.Module):
    """A loss of what is in a list: images, texts, boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, labels: Tensor, images: Any = None) -> Tensor:
        parts = [i if isinstance(i, Tensor) else torch.full((1, 4), float(len(i))) for i in images]
        return ((torch.cat(parts) * self.w).sum() - labels).square().sum()


@pytest.mark.parametrize(
    "images",
    [
        [torch.ones(1, 4)] * 2,
        [torch.ones(1, 4)] * 5,
        ["a", "bc"],
        ("a", "bc", "d"),
        [{"boxes": torch.ones(1, 4)}] * 2,
        [1, 2],
        [[torch.ones(1, 4)], [torch.ones(1, 4)]],
    ],
)
def test_a_list_that_may_hold_examples_is_not_given_whole(images: Any) -> None:
    model = dpft.wrap(TakesLists(), strategy="per_example")
    with pytest.raises(dpft.ClippingError, match="argument 'images' is a"):
        model(labels=torch.zeros(2), images=images)


@pytest.mark.parametrize("function", ["abadi", "automatic"])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_a_gradient_that_cancels_to_its_rounding(strategy: Any, scale: float, function: Any) -> None:
    """The norm is that of nothing, and what is released is rounding errors: as many as the terms are large."""
    width, generator = 512, torch.Generator().manual_seed(0)
    x = torch.randn(width, generator=generator).expand(2, 3, width) * scale
    opposite = torch.randn(1, 3, width, generator=generator)
    opposite[:, -1] = -opposite[:, :-1].sum(1)
    torch.manual_seed(0)
    model = dpft.wrap(nn.Linear(width, width, bias=False), strategy=strategy, clip_function=function)
    losses = (model(x.contiguous()) * opposite).sum((1, 2))
    dpft.clipped_loss(model, losses, torch.tensor([1.0, 0.0])).backward()
    assert released(model) <= 1.0


class DrawsAgain(nn.Module):
    """A head whose input is another one in the recomputation, while the gradient of its output is not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding, self.head, self.how = nn.Embedding(50, 32), nn.Linear(32, 7), how
        self.draws = torch.Generator().manual_seed(0)

    def block(self, x: Tensor) -> Tensor:
        if self.how == "dropout":
            return self.head(F.dropout(x, 0.5))  # type: ignore[no-any-return]  # a module's call is not typed
        if self.how == "order":
            x = x[:, torch.randperm(x.shape[1], generator=self.draws)]
            return self.head(x)  # type: ignore[no-any-return]  # a module's call is not typed
        ids = torch.randint(0, 50, x.shape[:2], generator=self.draws)
        return self.embedding(ids)  # type: ignore[no-any-return]  # a module's call is not typed

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)
        return (out * torch.arange(out.shape[1]).view(-1, 1)).sum((1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["dropout", "order", "ids"])
def test_two_pass_notices_another_input(how: str, dtype: torch.dtype) -> None:
    model = dpft.wrap(DrawsAgain(how).to(dtype), strategy="two_pass", isolation="off")
    x = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with pytest.raises(dpft.ClippingError, match="different gradients or inputs"):
        dpft.clipped_loss(model, model(x)).backward()
        dpft.clipped_loss(model, model(x))  # what was found is read at the next one


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_backward_that_failed_midway(strategy: Any) -> None:
    """What it left in .grad is not added to: the examples that were in it would count twice."""
    model, x = dpft.wrap(mlp(), strategy=strategy), inputs(3)
    once = dpft.clipped_loss(model, losses_of(model, x, strategy))
    once.backward()
    whole = released(model)
    model.zero_grad()

    def fail(grad: Tensor) -> None:
        raise RuntimeError("planted")

    losses = losses_of(model, x, strategy)
    (losses if isinstance(losses, Tensor) else losses[-1]).register_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        dpft.clipped_loss(model, losses).backward()
    if strategy == "per_example":  # the others had nothing in .grad yet
        with pytest.raises(dpft.ClippingError, match="an earlier backward failed midway"):
            dpft.clipped_loss(model, losses_of(model, x, strategy)).backward()
        model.zero_grad()
    for count in (1, 2):  # physical batches
        dpft.clipped_loss(model, losses_of(model, x, strategy)).backward()
        assert released(model) == pytest.approx(count * whole)


class TiedToANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm([3, 4]), nn.Linear(4, 3, bias=False)
        self.linear.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)).square().sum((1, 2)) + (self.norm(x) * x).sum((1, 2))


TIED_TO_A_NORM = zoo.Entry(
    "a norm's weight as a matrix",
    zoo.seeded(lambda a: TiedToANorm()),
    lambda examples, **_: {"x": torch.randn(examples, 3, 4, generator=torch.Generator().manual_seed(0))},
    lambda model, batch: model(batch["x"]),
    causal=False,
)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("examples", [1, 3, 40])  # per-example gradients are the smaller, or the pairs are
def test_a_matrix_that_is_a_norms_weight_too(strategy: Any, examples: int) -> None:
    """The gradients of both kinds of uses are added up before the norm is taken."""
    case = against_oracle.make_case(TIED_TO_A_NORM, TIED_TO_A_NORM.batch(examples))
    against_oracle.check(case, strategy=strategy)
