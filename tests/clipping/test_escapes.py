"""Ways out of the guarantee that were open once: each is refused, or bounded, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

import dpft
from dpft.clipping.factors import ClipRule
from tests import oracle, zoo
from tests.clipping.nets import Net, losses_of, seeded, step, x_batch
from tests.training import Training, tiny_llama

CLIP = 1e-6


class Averages(nn.Module):
    """A linear layer with a running mean of what it has seen."""

    def __init__(self, persistent: bool, moving: bool) -> None:
        super().__init__()
        self.inner, self.moving = nn.Linear(5, 3), moving
        self.register_buffer("mean", torch.zeros(5), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.moving and self.training:
            with torch.no_grad():
                self.mean += 0.1 * (x.mean(0) - self.mean)
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_buffer_that_is_saved_and_changed_is_refused(replaced: bool, rows: int) -> None:
    """Also by a batch of one row, which has no other row to be told apart from."""
    layer = Averages(persistent=True, moving=not replaced)
    if replaced:
        layer.register_forward_pre_hook(lambda module, args: setattr(module, "mean", args[0].mean(0)))
    model = dpft.wrap(nn.Sequential(layer))
    with pytest.raises(dpft.ClippingError, match=r"changed the buffers \['0.mean'\]"):
        model(torch.randn(rows, 5))


@pytest.mark.parametrize("model", [Averages(persistent=True, moving=False), Averages(persistent=False, moving=True)])
def test_other_buffers_are_not(model: nn.Module) -> None:
    dpft.wrap(model)
    model(torch.randn(4, 5))


def test_rotary_frequencies_that_grow_with_the_text_are_no_false_alarm() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = zoo.llama("sdpa", rope_parameters=scaling, max_position_embeddings=8)
    dpft.wrap(model, isolation="off")
    for tokens in (6, 20, 6):
        model(**zoo.token_batch(2, tokens)).loss.backward()


def test_two_losses_of_one_forward_have_the_same_padding_rows() -> None:
    model = dpft.wrap(zoo.MLP())
    batch = zoo.vector_batch(3)
    weight = torch.tensor([1.0, 1.0, 0.0])
    out = model(**inputs(batch), example_weight=weight)
    losses = out.flatten(1).square().sum(1)
    dpft.clipped_loss(model, losses)
    dpft.clipped_loss(model, losses).backward()
    assert torch.equal(dpft.stats(model).example_weights, weight)
    # the next forward's weights are its own
    out = model(**inputs(batch), example_weight=torch.tensor([0.0, 1.0, 1.0]))
    dpft.clipped_loss(model, out.flatten(1).square().sum(1)).backward()
    assert dpft.stats(model).example_weights.tolist() == [0.0, 1.0, 1.0]
    out = model(**inputs(batch))
    dpft.clipped_loss(model, out.flatten(1).square().sum(1)).backward()
    assert dpft.stats(model).example_weights.tolist() == [1.0, 1.0, 1.0]


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


class Prompted(nn.Module):
    """A layer inside a reentrant checkpoint that also uses a tensor of somebody else's."""

    def __init__(self, prompt: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.prompt = nn.Linear(5, 5), nn.Linear(5, 3), [prompt]

    def forward(self, x: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            out: Tensor = self.second(h + self.prompt[0])
            return out

        out: Tensor = torch.utils.checkpoint.checkpoint(block, self.first(x), use_reentrant=True)
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_a_tensor_of_nobodys_inside_a_reentrant_checkpoint_is_refused(trained: bool) -> None:
    torch.manual_seed(0)
    prompt = nn.Parameter(torch.randn(5), requires_grad=trained)
    model = dpft.wrap(Prompted(prompt))
    loss = dpft.clipped_loss(model, model(torch.randn(4, 5)).square().sum(1))
    if not trained:
        loss.backward()
        return
    with pytest.raises(dpft.UnsupportedModuleError, match=r"shape \[5\].*reentrant"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_sums_of_fp16_parameters_are_not_rounded_up(strategy: Any) -> None:
    """C = 1e-6 lies among fp16's subnormal numbers, 6e-8 apart: rounded to them, entries grow by up to a half."""
    torch.manual_seed(0)
    model = dpft.wrap(nn.Sequential(nn.Linear(64, 64, bias=False)).half(), max_grad_norm=CLIP, strategy=strategy)
    x = 0.01 * torch.randn(4, 64).half()
    rows: Any = [model(x[i : i + 1]) for i in range(4)] if strategy == "per_example" else model(x)
    losses = [row.float().square().sum() for row in rows]
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])
    dpft.clipped_loss(model, losses if strategy == "per_example" else torch.stack(losses), weight).backward()
    (p,) = model.parameters()
    assert p.grad is not None and p.grad.dtype == torch.float32
    assert p.grad.double().norm() <= CLIP * (1 + 1e-6)
    p.grad = None
    dpft.unwrap(model)
    model(x).sum().backward()
    assert p.grad.dtype == torch.float16


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("clip", ["abadi", "automatic"])
@pytest.mark.parametrize("size", [1e15, 1e19, 5e36, 3e38, float("inf")])
def test_no_input_is_too_large(size: float, clip: Any, strategy: Any) -> None:
    """A gradient of any size contributes at most C, or nothing, and the others as ever."""
    torch.manual_seed(0)
    model = dpft.wrap(nn.Linear(4, 3), clip_function=clip, strategy=strategy, isolation="off")
    x = torch.randn(3, 7, 4)
    x[0] = size
    rows: Any = [model(x[i : i + 1]) for i in range(3)] if strategy == "per_example" else model(x)
    losses = [row.sum() for row in rows]
    dpft.clipped_loss(model, losses if strategy == "per_example" else torch.stack(losses)).backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert total.isfinite().all() and total.norm() <= 3 * (1 + 1e-5)
    assert dpft.stats(model).clip_factors[1] > 0


def test_a_norm_whose_products_overflow_contributes_nothing() -> None:
    for function in ("abadi", "automatic"):
        rule = ClipRule(1.0, function)  # type: ignore[arg-type]  # the two names above
        factors = rule.factors(torch.tensor([1.0, 1e34, 1e37, 1e80], dtype=torch.float64))
        assert factors[:2].gt(0).all() and factors[2:].eq(0).all()


def test_targets_by_position_are_refused_by_name() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = dpft.wrap(BertForQuestionAnswering(BertConfig(**sizes, intermediate_size=16)))
    ids, where = torch.randint(0, 50, (3, 6)), torch.tensor([0, 1, 2])
    with pytest.raises(dpft.ClippingError, match=r"from positional arguments: one over the batch"):
        model(ids, None, None, None, None, where, where)
    out = model(input_ids=ids)  # and without them it trains
    logits = out.start_logits
    dpft.clipped_loss(model, nn.functional.cross_entropy(logits, where, reduction="none")).backward()


def test_a_full_ledger_of_an_earlier_run_is_refused_before_nothing_is_trained(tmp_path: Path) -> None:
    first = Training(tmp_path / "ledger.jsonl").train()
    folder = tmp_path / "checkpoint"
    first.accelerator.save_state(str(folder))
    first.close()
    second = Training(tmp_path / "ledger.jsonl", model=tiny_llama())
    with pytest.raises(dpft.LedgerError, match="3 releases of an earlier run"):
        second.train()
    second.close()
    third = Training(tmp_path / "ledger.jsonl", model=tiny_llama(), continue_ledger=True)
    with pytest.raises(dpft.BudgetExceededError, match="3 of 3"):
        third.train()
    third.close()
    resumed = Training(tmp_path / "ledger.jsonl", model=tiny_llama())
    resumed.accelerator.load_state(str(folder))
    assert list(resumed.loader) == []  # what was resumed is finished
    resumed.close()


def test_a_second_loop_over_a_finished_loader_yields_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger.jsonl").train()
    assert list(training.loader) == []


class Reversible(torch.autograd.Function):
    """Runs its layer's backward inside of its own, as Reformer's reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        with torch.no_grad():
            return layer(x)  # type: ignore[no-any-return]  # torch's modules are untyped

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, g)
        return x.grad, None


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_a_backward_inside_of_a_backward(strategy: str) -> None:
    """It accumulates into `.grad`, which `torch.autograd.grad` does not see: unclipped, if nobody looked."""

    def make() -> nn.Module:
        return Net(nn.Linear(6, 6), lambda model, h: Reversible.apply(h, model.middle))

    plain = seeded(make).double()
    batch = x_batch()
    grads = []
    for i in range(len(batch["x"])):
        plain.zero_grad()
        losses_of(plain, oracle.row({k: v.double() for k, v in batch.items()}, i)).sum().backward()
        grads.append([p.grad.clone() for p in plain.parameters()])  # type: ignore[union-attr]  # all are trained
    norms = torch.stack([torch.stack([g.square().sum() for g in each]).sum().sqrt() for each in grads])
    bound = float(norms.median())
    model = dpft.wrap(seeded(make), strategy=strategy, max_grad_norm=bound)  # type: ignore[arg-type]  # a parameter
    step(model, strategy)
    torch.testing.assert_close(dpft.stats(model).norms.double(), norms, rtol=1e-5, atol=0)
    factors = (bound / norms).clamp(max=1)
    for k, p in enumerate(model.parameters()):
        expected = sum(f * each[k] for f, each in zip(factors, grads, strict=True))
        torch.testing.assert_close(p.grad.double(), expected, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]  # all are trained
