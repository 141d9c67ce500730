"""What a single bad example may do to the others: nothing."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import dpft
from tests import oracle, zoo
from tests.clipping.against_oracle import (
    CHECKPOINTING,
    STRATEGIES,
    Case,
    case_of,
    check_grads,
    clipped_loss,
    make_case,
    set_checkpointing,
)

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
BAD = [math.nan, math.inf, -math.inf, 3e38]
BAD_IDS = ["nan", "inf", "-inf", "overflow"]


def embeds_batch(seed: int = 3) -> dict[str, Tensor]:
    batch = zoo.token_batch()
    batch["inputs_embeds"] = torch.randn(
        *batch.pop("input_ids").shape, zoo.WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    return batch


@functools.cache
def embeds_case(entry: zoo.Entry) -> Case:
    return make_case(entry, embeds_batch())


@strategies
@pytest.mark.parametrize("value", BAD, ids=BAD_IDS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2], ids=str)
def test_bad_example_counts_for_nothing(entry: zoo.Entry, checkpointing: str, value: float, strategy: str) -> None:
    """NaN or infinite: exactly zero, and the others are as if it were not there."""
    case = embeds_case(entry)
    batch = {k: v.clone() for k, v in case.batch.items()}
    batch["inputs_embeds"][1] = value
    model = dpft.wrap(case.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    set_checkpointing(model, checkpointing)
    if checkpointing == "reentrant":
        batch["inputs_embeds"].requires_grad_()
    model(**batch).loss.backward()
    stats = dpft.stats(model)
    if stats.norms[1].isfinite():  # RMSNorm and LayerNorm can turn a huge input into an ordinary one
        assert value == 3e38
        assert stats.clip_factors[1] <= 1
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        return
    assert stats.clip_factors[1] == 0
    others = case.exact.factors(case.max_grad_norm) * torch.tensor([1.0, 0.0, 1.0, 1.0])
    check_grads(case, model, others)


@strategies
@pytest.mark.parametrize("clip_function", ["abadi", "automatic"])
@pytest.mark.parametrize("mode", ["flash", "ghost", "fast", "per_sample"])
@pytest.mark.parametrize("value", BAD, ids=BAD_IDS)
def test_bad_vector(value: float, mode: str, clip_function: str, strategy: str) -> None:
    """The same for a plain model with biases, every mode."""
    if mode != "flash" and strategy != {"per_sample": "one_pass"}.get(mode, "two_pass"):
        pytest.skip("not a strategy of this mode")
    case = case_of(zoo.MLP_ENTRY)
    batch = {k: v.clone() for k, v in case.batch.items()}
    batch["x"][2, 3] = value
    model = dpft.wrap(
        case.build(),
        clipping=mode,
        strategy=strategy,
        max_grad_norm=case.max_grad_norm,
        clip_function=clip_function,
    )
    clipped_loss(model, zoo.vector_losses, batch, strategy).backward()
    stats, expected = dpft.stats(model), case.exact.factors(case.max_grad_norm, clip_function)
    if stats.norms[2].isfinite():
        assert (value == 3e38 and stats.clip_factors[2] <= 1 + 1e-6) or clip_function == "automatic"
        return
    assert stats.clip_factors[2] == 0
    check_grads(case, model, expected * torch.tensor([1.0, 1.0, 0.0, 1.0]))


@strategies
def test_all_examples_bad(strategy: str) -> None:
    """The clipped sum is exactly zero, not NaN."""
    batch = embeds_batch()
    batch["inputs_embeds"][:] = math.nan
    model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy)
    model(**batch).loss.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
    assert torch.equal(dpft.stats(model).clip_factors, torch.zeros(4))


@strategies
def test_bad_step_leaves_no_trace(strategy: str) -> None:
    """The step after a NaN is as good as any, and so is what was accumulated before it."""
    case = embeds_case(zoo.LLAMA_TIED)
    bad = {k: v.clone() for k, v in case.batch.items()}
    bad["inputs_embeds"][:] = math.nan
    model = dpft.wrap(case.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    model(**bad).loss.backward()
    model(**case.batch).loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))
    model(**bad).loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))


class Scaled(nn.Module):
    """y = W (scale * x): the gradient of an example is as large as its scale says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


@strategies
@pytest.mark.parametrize("scale", [1e6, 1e12, 1e18])
def test_huge_example(scale: float, strategy: str) -> None:
    """A loss multiplied by 1e18 (its squared norm does not fit float32) is clipped to C; the others keep their bits
    beyond rounding."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(4, 6)
    factor = torch.tensor([1.0, scale, 1.0, 1.0])

    def losses_of(m: nn.Module, batch: oracle.Batch) -> Tensor:
        return m(batch["x"]).square().sum(-1) * batch["factor"]

    batch = {"x": x, "factor": factor}
    exact = oracle.oracle(model, batch, losses_of)
    limit = 1e-5
    dpft.wrap(model, strategy=strategy, max_grad_norm=1.0)
    clipped_loss(model, losses_of, batch, strategy).backward()
    stats, grads = dpft.stats(model), oracle.grads_of(model)
    if stats.norms[1].isfinite():
        expected = exact.clipped_sum(1.0)
        torch.testing.assert_close(stats.norms.double(), exact.norms, rtol=1e-5, atol=0)
    else:
        expected = exact.weighted_sum(exact.factors(1.0) * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert oracle.relative_error(grads, expected) <= limit


@strategies
@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e-20])
def test_tiny_example(scale: float, strategy: str) -> None:
    """Small gradients are not clipped, nor enlarged by Abadi, nor divided by zero."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(3, 6)

    def losses_of(m: nn.Module, batch: oracle.Batch) -> Tensor:
        return m(batch["x"]).square().sum(-1) * scale

    exact = oracle.oracle(model, {"x": x}, losses_of)
    dpft.wrap(model, strategy=strategy, max_grad_norm=1.0)
    clipped_loss(model, losses_of, {"x": x}, strategy).backward()
    assert torch.equal(dpft.stats(model).clip_factors, torch.ones(3))
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(1.0)) <= 1e-5


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, math.nan, math.inf])
def test_bad_clip_norm(max_grad_norm: float) -> None:
    model = zoo.MLP_ENTRY.build()
    with pytest.raises(ValueError):
        dpft.wrap(model, max_grad_norm=max_grad_norm)


@pytest.mark.parametrize(
    "options", [{"clipping": "flush"}, {"strategy": "three_pass"}, {"clip_function": "sgd"}, {"clip_gamma": -1.0}]
)
def test_bad_options(options: dict[str, object]) -> None:
    """Named, with what was got."""
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        dpft.wrap(zoo.MLP_ENTRY.build(), **{"clip_function": "automatic", **options})


@pytest.mark.parametrize("batch", [2, 40])
def test_a_dropped_row_may_be_infinite_in_the_second_pass_alone(batch: int) -> None:
    """Its norm was finite, so nothing but its factor says that it must not reach the sum."""
    torch.manual_seed(0)
    model = dpft.wrap(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), strategy="two_pass")
    state = model._dpft_state

    def hook(grad: Tensor) -> Tensor:
        return torch.cat([grad[:1] * torch.inf, grad[1:]]) if state.active.weighted else grad

    def ask(module: nn.Module, inputs: object, out: Tensor) -> None:
        if out.requires_grad:  # not where a row is run alone
            out.register_hook(hook)

    model[0].register_forward_hook(ask)
    weights = torch.ones(batch)
    weights[0] = 0
    dpft.clipped_loss(model, model(torch.randn(batch, 3, 6)).square().sum((1, 2)), weights).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
