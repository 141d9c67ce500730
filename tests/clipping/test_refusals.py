"""Refused rather than wrong: forwards that no rule describes, rows that are not examples, ways round the seam."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpft
from dpft.errors import ClippingError, DPFTError, UnsupportedModuleError
from tests import oracle, zoo
from tests.clipping.against_oracle import STRATEGIES, clipped_loss
from tests.clipping.nets import Net, exact_or_refused, losses_of, no_gradient, seeded, step, x_batch

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
norm_strategies = pytest.mark.parametrize("strategy", STRATEGIES[:2])


# --- the forward is not what its modules say ------------------------------------------------------------------------


def bypass(net: Any, h: Tensor) -> Tensor:
    return F.linear(h, net.last.weight)


def penalty(net: Any, h: Tensor) -> Tensor:
    return h + net.first.weight.square().sum()


@norm_strategies
@pytest.mark.parametrize("way", [bypass, penalty])
def test_functional_use_of_a_parameter_is_noticed(way: Callable[[Any, Tensor], Tensor], strategy: str) -> None:
    with pytest.raises(DPFTError, match=r"last\.weight|first\.weight"):
        step(dpft.wrap(seeded(lambda: Net(forward=way)), strategy=strategy), strategy)


@pytest.mark.parametrize("way", [bypass, penalty])
def test_functional_use_is_fine_per_example(way: Callable[[Any, Tensor], Tensor]) -> None:
    assert exact_or_refused(lambda: Net(forward=way), x_batch(), "per_example") == "exact"


def twice(net: Any, h: Tensor) -> Tensor:
    return net.first(torch.tanh(net.first(h)))


def twice_with_norm(net: Any, h: Tensor) -> Tensor:
    return net.middle(net.middle(h) + h)


@strategies
@pytest.mark.parametrize("way", [twice, twice_with_norm])
def test_shared_module_is_exact_or_refused(way: Callable[[Any, Tensor], Tensor], strategy: str) -> None:
    """Two call sites: the norm of the sum is not the sum of the norms."""
    exact_or_refused(lambda: Net(nn.LayerNorm(6), forward=way), x_batch(), strategy)


@strategies
def test_tied_linears_are_exact_or_refused(strategy: str) -> None:
    """Two modules, one parameter."""

    def make() -> nn.Module:
        model = Net()
        model.last.weight = model.first.weight
        return model

    exact_or_refused(make, x_batch(), strategy)


@strategies
def test_unused_module_does_not_count(strategy: str) -> None:
    """A layer that this step does not use has no norm, not its last one."""
    model = seeded(lambda: Net(nn.Linear(6, 6)))
    exact = oracle.oracle(seeded(lambda: Net(nn.Linear(6, 6), forward=lambda net, h: h)), x_batch(), losses_of)
    dpft.wrap(model, strategy=strategy, max_grad_norm=0.01)
    step(model, strategy)
    model.zero_grad(set_to_none=True)
    model.way = lambda net, h: h
    step(model, strategy)
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(0.01)) < 1e-5


# --- rows that are not examples -------------------------------------------------------------------------------------


def centred(net: Any, h: Tensor) -> Tensor:
    return net.middle(h - h.mean(0))


def batch_softmax(net: Any, h: Tensor) -> Tensor:
    return net.middle(h).softmax(0)


def rolled(net: Any, h: Tensor) -> Tensor:
    return net.middle(h).roll(1, 0)


def sequence_first(net: Any, h: Tensor) -> Tensor:
    return net.middle(h.transpose(0, 1)).transpose(0, 1)


def permuted_rows(net: Any, h: Tensor) -> Tensor:
    """A mixture of experts: tokens are sorted by expert, each expert sees its share."""
    flat = h.reshape(-1, 6)
    order = torch.arange(len(flat)).roll(1).flip(0)
    return net.middle(flat[order])[order.argsort()].view(h.shape)


def routed(net: Any, h: Tensor) -> Tensor:
    """Only the tokens that a router selects are seen, so many of one example and so many of another."""
    flat = h.reshape(-1, 6)
    chosen = (flat[:, 0] > 0).nonzero().squeeze(1)
    return flat.index_copy(0, chosen, net.middle(flat[chosen])).view(h.shape)


MIXING = (centred, batch_softmax, rolled)
REORDERING = (sequence_first, permuted_rows)


@norm_strategies
@pytest.mark.parametrize("way", MIXING)
def test_mixing_of_examples_is_refused(way: Callable[[Any, Tensor], Tensor], strategy: str) -> None:
    """There is no gradient of one example where a loss depends on two."""
    model = dpft.wrap(seeded(lambda: Net(nn.Linear(6, 6), forward=way)), strategy=strategy)
    with pytest.raises((ClippingError, UnsupportedModuleError)):
        step(model, strategy)


@norm_strategies
@pytest.mark.parametrize(("examples", "tokens"), [(3, 5), (3, 6), (2, 4), (4, 4)])
@pytest.mark.parametrize("way", REORDERING)
def test_reordered_rows_are_refused(
    way: Callable[[Any, Tensor], Tensor], examples: int, tokens: int, strategy: str
) -> None:
    """Their leading dimension is not the batch, whatever its size."""
    model = dpft.wrap(seeded(lambda: Net(nn.Linear(6, 6), forward=way)), strategy=strategy)
    with pytest.raises((ClippingError, UnsupportedModuleError)):
        step(model, strategy, x_batch(examples, tokens))


@norm_strategies
@pytest.mark.parametrize(("examples", "tokens"), [(1, 8), (2, 5), (2, 8), (3, 9)])
def test_routing_is_exact_or_refused(examples: int, tokens: int, strategy: str) -> None:
    exact_or_refused(lambda: Net(nn.Linear(6, 6), forward=routed), x_batch(examples, tokens), strategy)


@norm_strategies
def test_routing_that_changes_after_the_probe(strategy: str) -> None:
    """Two and two rows of two examples, then one and three: the shape is the same, the owners are not."""

    def make() -> nn.Module:
        model = Net(nn.Linear(6, 6), forward=routed)
        with torch.no_grad():
            model.first.weight[0] = torch.eye(6)[0]  # the router reads the input's first feature
            model.first.bias[0] = 0.0
        return model

    even, uneven = x_batch(2, 4), x_batch(2, 4)
    even["x"][..., 0] = torch.tensor([[1.0, 1, -1, -1], [1, 1, -1, -1]])
    uneven["x"][..., 0] = torch.tensor([[1.0, -1, -1, -1], [1, 1, 1, -1]])
    exact = oracle.oracle(seeded(make), uneven, losses_of)
    model = dpft.wrap(seeded(make), strategy=strategy, max_grad_norm=1e-2)
    try:
        step(model, strategy, even)
        model.zero_grad(set_to_none=True)
        step(model, strategy, uneven)
    except DPFTError:
        return
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", MIXING)
def test_per_example_refuses_losses_of_one_batched_forward(way: Callable[[Any, Tensor], Tensor]) -> None:
    """Nothing is known of how they mix: it wants a forward of each example alone."""
    model = dpft.wrap(seeded(lambda: Net(nn.Linear(6, 6), forward=way)), strategy="per_example")
    with pytest.raises(ClippingError, match="forward of its own"):
        dpft.clipped_loss(model, losses_of(model, x_batch())).backward()
    assert no_gradient(model)


@pytest.mark.parametrize("way", REORDERING)
def test_reordered_rows_are_fine_per_example(way: Callable[[Any, Tensor], Tensor]) -> None:
    assert exact_or_refused(lambda: Net(nn.Linear(6, 6), forward=way), x_batch(), "per_example") == "exact"


@strategies
def test_flattened_rows_are_exact_or_refused(strategy: str) -> None:
    """[B * T, p] is understood where a model is known to keep an example's rows together (OPT), else refused."""

    def flattened(net: Any, h: Tensor) -> Tensor:
        return net.middle(h.reshape(-1, 6)).view(h.shape)

    for shape in ((3, 5), (3, 3), (1, 4)):
        exact_or_refused(lambda: Net(nn.Linear(6, 6), forward=flattened), x_batch(*shape), strategy)


@norm_strategies
def test_losses_of_the_wrong_batch_size_are_refused(strategy: str) -> None:
    """A loss per token, or one for all, is not a loss per example."""
    model = dpft.wrap(seeded(Net), strategy=strategy)
    batch = x_batch()
    for reduce in (
        lambda y: y.square().mean(),
        lambda y: y.square().mean(-1),
        lambda y: y.square().mean(-1).flatten(),
    ):
        with pytest.raises((DPFTError, ValueError)):
            dpft.clipped_loss(model, reduce(model(batch["x"]))).backward()


@norm_strategies
def test_losses_that_mix_are_refused(strategy: str) -> None:
    """Per-example losses that were normalised over the batch."""
    model = dpft.wrap(seeded(Net), strategy=strategy)
    losses = losses_of(model, x_batch())
    with pytest.raises((ClippingError, UnsupportedModuleError)):
        dpft.clipped_loss(model, losses / losses.sum()).backward()


# --- backward that does not go through the seam ----------------------------------------------------------------------


@strategies
def test_backward_of_logits_is_refused(strategy: str) -> None:
    model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy)
    out = model(**zoo.token_batch())
    # per_example returns logits without a graph, which PyTorch itself refuses
    expected = (RuntimeError, "grad") if strategy == "per_example" else (ClippingError, "clipped_loss")
    with pytest.raises(expected[0], match=expected[1]):
        out.logits.sum().backward()
    assert no_gradient(model)


@strategies
def test_loss_plus_something_else_is_never_unclipped(strategy: str) -> None:
    """A z-loss on the logits, added to the private loss: an error, or at least not in the gradient."""
    batch = zoo.token_batch()
    exact = oracle.oracle(zoo.LLAMA_TIED.build(), batch)
    model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy, max_grad_norm=1.0)
    out = model(**batch)
    with contextlib.suppress(RuntimeError):  # ClippingError is one
        (out.loss + out.logits.float().logsumexp(-1).square().mean()).backward()
    if not no_gradient(model):
        assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(1.0)) < 1e-5


@strategies
def test_mean_of_own_losses_is_refused(strategy: str) -> None:
    """`losses.mean().backward()` without `clipped_loss`."""
    model = dpft.wrap(zoo.MLP_ENTRY.build(), strategy=strategy)
    with pytest.raises(ClippingError, match="clipped_loss"):
        zoo.vector_losses(model, zoo.vector_batch()).mean().backward()
    assert no_gradient(model)


@strategies
def test_loss_of_a_head_that_is_no_language_model(strategy: str) -> None:
    """The model's mean over the batch is each example's own loss instead."""
    batch = zoo.BERT.batch()
    exact = oracle.oracle(zoo.BERT.build(), batch, zoo.BERT.losses)
    bound = float(exact.norms.median())
    model = dpft.wrap(zoo.BERT.build(), strategy=strategy, max_grad_norm=bound)
    model(**batch).loss.backward()
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(bound)) < 1e-5


@strategies
def test_backward_twice_is_refused(strategy: str) -> None:
    """The second would count every example twice for one release."""
    model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy)
    loss = model(**zoo.token_batch()).loss
    loss.backward()
    with pytest.raises((DPFTError, RuntimeError)):
        loss.backward()


@strategies
def test_double_backward_is_refused(strategy: str) -> None:
    """`create_graph=True` has no meaning for a clipped sum."""
    model = dpft.wrap(zoo.MLP_ENTRY.build(), strategy=strategy)
    loss = clipped_loss(model, zoo.vector_losses, zoo.vector_batch(), strategy)
    with warnings.catch_warnings(), pytest.raises((DPFTError, RuntimeError)):
        warnings.simplefilter("ignore")
        loss.backward(create_graph=True)
        sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).backward()


@strategies
def test_num_items_in_batch_does_not_reach_the_loss(strategy: str) -> None:
    """Hugging Face's mean over the batch's tokens makes one example's gradient depend on the others."""
    batch = zoo.token_batch()
    exact = oracle.oracle(zoo.LLAMA_TIED.build(), batch)
    model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy, max_grad_norm=1e6)
    try:
        model(**batch, num_items_in_batch=torch.tensor(7)).loss.backward()
    except DPFTError:
        return
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(1e6)) < 1e-5
