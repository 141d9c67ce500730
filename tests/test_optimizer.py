"""`DPOptimizer`: what reaches the inner optimiser is (clipped sum + noise) / b, once per logical batch, in float32."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.errors import WrapError
from tests.summed import SECRET, SIGMA, B, C, give, parameters, private, releases, same, sgd, signals, snapshot

# --- what is released ------------------------------------------------------------------------------------------------


def test_the_inner_optimiser_sees_sum_plus_noise_over_b() -> None:
    params = parameters()
    before = snapshot(params)
    optimizer = private(sgd(params))
    first, second = signals(2), signals(3)
    for sums in (first, second):
        give(params, sums)
        optimizer.step()
        optimizer.zero_grad()
    expected = before
    for release in releases(first, second):
        expected = [w - r for w, r in zip(expected, release, strict=True)]
    for got, want in zip(params, expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=4e-7)
    assert optimizer.releases == 2


def test_noise_has_the_stated_deviation() -> None:
    """Not by replay: the statistics of what moves a large parameter whose gradient is zero."""
    p = nn.Parameter(torch.zeros(400_000))
    optimizer = private(sgd([p]), noise=None)
    give([p], [torch.zeros(400_000)])
    optimizer.step()
    assert abs(p.detach().double().std() / (SIGMA * C / B) - 1) < 6 / math.sqrt(2 * p.numel())


def test_noise_is_independent_between_parameters_and_steps() -> None:
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.float64)) for _ in range(3)]
    optimizer = private(sgd(params))
    moves = []
    for _ in range(3):
        before = snapshot(params)
        optimizer.step()
        optimizer.zero_grad()
        moves += [p.detach() - w for p, w in zip(params, before, strict=True)]
    together = torch.corrcoef(torch.stack(moves)) - torch.eye(9)
    assert together.abs().max() < 5 / math.sqrt(1000)
    assert all(p.unique().numel() == 1000 for p in params)


def test_sum_scale_is_folded_into_noise_and_divisor() -> None:
    """An engine that leaves s times the sum: the same release, to rounding."""
    params, plain = parameters(), parameters()
    optimizer, unscaled = private(sgd(params), sum_scale=0.25), private(sgd(plain))
    give(params, [0.25 * s for s in signals()])
    give(plain, signals())
    optimizer.step()
    unscaled.step()
    for got, want in zip(params, plain, strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=0, atol=2e-7)


def test_noise_multiplier_zero_divides_and_adds_nothing() -> None:
    params = parameters()
    before = snapshot(params)
    optimizer = private(sgd(params), noise_multiplier=0)
    give(params, signals())
    optimizer.step()
    assert same(params, [w - s / B for w, s in zip(before, signals(), strict=True)])
    assert "NOT PRIVATE" in repr(optimizer) and "NOT PRIVATE" not in repr(private(sgd(parameters())))


# --- logical batches -------------------------------------------------------------------------------------------------


def test_noise_once_per_logical_batch_and_zero_grad_inside_keeps_the_sum() -> None:
    params, last = parameters(), False
    before = snapshot(params)
    optimizer = private(sgd(params), is_last=lambda: last)
    parts = [signals(seed) for seed in range(4)]
    for number, part in enumerate(parts):
        last = number == 3
        give(params, part)
        optimizer.step()
        if not last:
            assert same(params, before) and optimizer.releases == 0
        optimizer.zero_grad()
        assert (params[0].grad is None) == last
    (release,) = releases([sum(s, torch.zeros(())) for s in zip(*parts, strict=True)])
    for got, w, r in zip(params, before, release, strict=True):
        torch.testing.assert_close(got.detach(), w - r, rtol=0, atol=4e-7)
    assert optimizer.releases == 1


@pytest.mark.parametrize("missing", [[0], [1, 2], [0, 1, 2]])
def test_a_parameter_without_a_gradient_gets_noise(missing: list[int]) -> None:
    """Else its standing still would tell that nobody in the batch used it. All missing: an empty logical batch."""
    params = parameters()
    before = snapshot(params)
    optimizer = private(sgd(params))
    sums = signals()
    for i in range(3):
        if i in missing:
            sums[i].zero_()
        else:
            params[i].grad = sums[i].clone()
    optimizer.step()
    (release,) = releases(sums)
    for got, w, r in zip(params, before, release, strict=True):
        torch.testing.assert_close(got.detach(), w - r, rtol=0, atol=2e-7)
        assert not (got == w).any()
    assert optimizer.releases == 1


def test_step_twice_without_zero_grad_is_refused() -> None:
    params = parameters()
    optimizer = private(sgd(params))
    give(params, signals())
    optimizer.step()
    before = snapshot(params)
    with pytest.raises(WrapError, match="zero_grad"):
        optimizer.step()
    give(params, signals())
    with pytest.raises(WrapError, match="zero_grad"):
        optimizer.step()
    assert same(params, before) and optimizer.releases == 1
    optimizer.zero_grad()
    give(params, signals())
    optimizer.step()
    assert optimizer.releases == 2


def test_closure_is_refused() -> None:
    params = parameters()
    optimizer = private(sgd(params))
    before = snapshot(params)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    assert same(params, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_from_before_are_dropped(set_to_none: bool) -> None:
    """Those from before the optimiser was made are no clipped sums; nor is a release kept after zero_grad."""
    params = parameters()
    give(params, [1000 * s for s in signals()])
    optimizer = private(sgd(params), noise_multiplier=0)
    before = snapshot(params)
    optimizer.step()
    assert same(params, before)
    optimizer.zero_grad(set_to_none)
    give(params, signals())
    optimizer.step()
    optimizer.zero_grad(set_to_none)
    before = snapshot(params)
    optimizer.step()
    assert same(params, before)


# --- precision -------------------------------------------------------------------------------------------------------


def test_bf16_parameters_accumulate_in_float32() -> None:
    """256 + 1 is 256 in bf16; 256 physical batches of 1 after one of 256 would all be lost."""
    p = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    last = False
    optimizer = private(sgd([p]), noise_multiplier=0, expected_batch_size=512, is_last=lambda: last)
    for number in range(257):
        last = number == 256
        p.backward(torch.full((8,), 256.0 if number == 0 else 1.0, dtype=torch.bfloat16))
        assert p.grad is not None and p.grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(p.detach(), torch.full((8,), -1.0, dtype=torch.bfloat16))


def test_noise_of_bf16_parameters_is_drawn_in_float32() -> None:
    """Noise drawn in bf16 has some 3,000 values, and a small sum under large noise vanishes if added in bf16."""
    seen: list[Tensor] = []

    class Spy(dpft.GaussianNoise):
        def add_(self, tensor: Tensor, std: float) -> Tensor:
            seen.append(super().add_(tensor, std).clone())
            return tensor

    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    optimizer = private(sgd([p]), noise=Spy(SECRET))
    optimizer.step()
    assert seen[0].dtype == torch.float32 and seen[0].unique().numel() > 99_000
    assert p.grad is not None and p.grad.dtype == torch.bfloat16  # as the inner optimiser expects it
    assert torch.equal(p.detach(), (-(seen[0] / B)).bfloat16())


def test_accumulators_take_the_place_of_grad() -> None:
    """Nothing as large as a gradient is held besides `.grad`: not between steps, not inside a logical batch."""
    p = nn.Parameter(torch.zeros(1000, 1003, dtype=torch.bfloat16))
    last = False

    def live() -> int:
        found = {}
        for thing in gc.get_objects():
            if type(thing) in (Tensor, nn.Parameter) and thing.numel() >= 1_000_000:
                tensors = [thing] if thing.grad is None else [thing, thing.grad]
                found.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})
        return sum(found.values())

    base = live()
    assert base >= 2 * p.numel()
    optimizer = private(sgd([p]), is_last=lambda: last)
    for last in (False, True):
        p.sum().backward()
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert live() == base + 4 * p.numel()
        optimizer.step()
        assert live() == base + (2 if last else 4) * p.numel()
        optimizer.zero_grad()
        assert live() == base + (0 if last else 4) * p.numel()


def test_a_gradient_that_is_bf16_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = private(sgd([p]))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(WrapError, match="bfloat16"):
        optimizer.step()
    assert optimizer.releases == 0 and p.detach().count_nonzero() == 0


# --- order of events -------------------------------------------------------------------------------------------------


def test_check_then_ledger_then_noise_then_parameters() -> None:
    params = parameters()
    before = snapshot(params)
    events: list[str] = []

    def log(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            assert same(params, before), name
            events.append(name)

        return called

    class Noise(dpft.GaussianNoise):
        def add_(self, tensor: Tensor, std: float) -> Tensor:
            log("noise")()
            return super().add_(tensor, std)

    optimizer = private(sgd(params), check=log("check"), on_release=log("ledger"), noise=Noise(SECRET))
    give(params, signals())
    optimizer.step()
    assert events == ["check", "ledger", "noise", "noise", "noise"] and not same(params, before)


@pytest.mark.parametrize("hook", ["check", "on_release"])
def test_a_hook_that_raises_stops_the_release(hook: str) -> None:
    params = parameters()
    before = snapshot(params)

    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    optimizer = private(torch.optim.AdamW(params), **{hook: refuse})
    give(params, signals())
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert same(params, before) and optimizer.releases == 0 and not optimizer.state


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_multiplier", v) for v in (-0.1, math.nan, math.inf, True, None, "1")]
    + [
        (name, v)
        for name in ("max_grad_norm", "expected_batch_size", "sum_scale")
        for v in (0, -1.0, math.nan, math.inf, True, None, "1")
    ],
)
def test_wrong_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        private(sgd(parameters()), **{name: value})


def test_wrong_optimisers() -> None:
    wrong: list[Any] = [None, nn.Linear(2, 2), torch.optim.SGD, private(sgd(parameters()))]
    for optimizer in wrong:
        with pytest.raises(ValueError, match="Optimizer"):
            private(optimizer)


def test_own_noise_is_fresh_and_secure_where_asked() -> None:
    moved = []
    for secure in (False, False, True):
        p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizer = private(sgd([p]), noise=None, secure_rng=secure)
        assert optimizer.noise.secure == secure and not optimizer.noise.known_secret
        optimizer.step()
        moved.append(p.detach())
    assert torch.cat(moved).unique().numel() == 150
