"""torch.compile: around a wrapped model it changes nothing, of its parts it is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dpft
from tests import zoo

CLIP = 0.1


def wrapped(**options: Any) -> Any:
    return dpft.wrap(zoo.LLAMA.build(), max_grad_norm=CLIP, **options)


def around(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def in_place(model: Any) -> Any:
    model.compile(backend="aot_eager")
    return model


def a_function(model: Any) -> Any:
    return torch.compile(lambda **batch: model(**batch), backend="aot_eager")


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [around, in_place, a_function])
def test_around_the_model_it_changes_nothing(compiled: Callable[[Any], Any]) -> None:
    plain, model = wrapped(strategy="one_pass"), wrapped(strategy="one_pass")
    call = compiled(model)
    for _ in range(2):
        plain(**zoo.LLAMA.batch()).loss.backward()
        call(**zoo.LLAMA.batch()).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(dpft.stats(model).norms, dpft.stats(plain).norms)


def test_a_compiled_part_is_refused() -> None:
    for before in (True, False):
        model = zoo.LLAMA.build()
        if before:
            model.model.layers[1].compile(backend="eager")
        dpft.wrap(model)
        if not before:
            model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        # The container has other names for what it holds: that alone is refused, too.
        with pytest.raises((dpft.ClippingError, dpft.WrapError), match=r"compiled|layers\.1\._orig_mod"):
            model(**zoo.LLAMA.batch())


@pytest.mark.slow
def test_a_compiled_part_is_fine_one_example_at_a_time() -> None:
    """No rule sees into it, and none has to."""
    plain, model = wrapped(strategy="per_example"), zoo.LLAMA.build()
    model.model.layers[1].compile(backend="aot_eager")
    dpft.wrap(model, max_grad_norm=CLIP, strategy="per_example")
    for one in (plain, model):
        one(**zoo.LLAMA.batch(examples=2)).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_compiled_model_itself_is_not_wrapped() -> None:
    with pytest.raises(dpft.UnsupportedModuleError, match="compiled"):
        dpft.wrap(torch.compile(zoo.LLAMA.build(), backend="eager"))  # type: ignore[arg-type]  # torch types it as a callable
