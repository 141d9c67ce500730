"""The oracle itself, against plain autograd: it must be right before anything is compared with it."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import oracle, zoo


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
def test_sum_of_the_oracle_is_the_batched_gradient(entry: zoo.Entry, padding: str) -> None:
    """Alone or in a batch, an example has the same loss and gradient, to float64's own rounding."""
    model, batch = entry.build(), entry.batch(padding=padding)
    exact = oracle.oracle(model, batch, entry.losses)
    twin = copy.deepcopy(model).double()
    with oracle.Float64():
        losses = entry.losses(twin, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        losses.sum().backward()
    torch.testing.assert_close(losses.detach(), exact.losses, rtol=1e-12, atol=0)
    assert oracle.relative_error(oracle.grads_of(twin), exact.weighted_sum(torch.ones(4))) < 1e-13
    assert exact.norms.min() > 0.1


@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
def test_plain_pytorch_in_float32_is_close(entry: zoo.Entry) -> None:
    """The yardstick of the other tests is small, and not zero."""
    model, batch = entry.build(), entry.batch()
    exact = oracle.oracle(model, batch, entry.losses)
    assert 1e-8 < oracle.plain_error(model, batch, exact, entry.losses) < 2e-6


def test_oracle_agrees_with_hugging_face_on_one_example() -> None:
    """For one example, Hugging Face's mean over the batch's tokens is the mean over the example's own."""
    model, batch = zoo.LLAMA_TIED.build(), zoo.token_batch(examples=1)
    exact = oracle.oracle(model, batch)
    loss = model(**batch).loss
    loss.backward()
    assert abs(loss.item() - exact.losses[0].item()) < 1e-5
    assert oracle.relative_error(oracle.grads_of(model), exact.grads[0]) < 1e-6


def test_clip_factors_by_their_definition() -> None:
    """Abadi leaves small gradients alone, automatic never does; a gradient that is not finite counts for nothing."""
    grads = [torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])]
    grads += [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 0.0])]
    exact = oracle.PerExample(torch.zeros(6).double(), tuple({"w": g.double()} for g in grads))
    torch.testing.assert_close(exact.factors(1.0), torch.tensor([1, 0.2, 1, 1, 0, 0]).double())
    torch.testing.assert_close(
        exact.factors(1.0, "automatic", 0.5), torch.tensor([1, 1 / 5.5, 2, 1 / 1.5, 0, 0]).double()
    )
    torch.testing.assert_close(exact.clipped_sum(1.0)["w"], torch.tensor([0.9, 2.2]).double())


def test_relative_error_is_over_the_whole_gradient() -> None:
    """A wrong small parameter counts by its size, and a missing gradient counts as zeros."""
    expected = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([4.0]).double()}
    assert oracle.relative_error({"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}, expected) == 0.1
    assert oracle.relative_error({"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}, expected) == 1.0
