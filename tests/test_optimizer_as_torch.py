"""`DPOptimizer` as a `torch.optim.Optimizer`: over any optimiser, under schedulers, saved, prepared, with groups."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

import dpft
from accelerate import Accelerator
from dpft.errors import WrapError
from tests.summed import SECRET, SIGMA, B, C, give, parameters, private, same, sgd, signals, snapshot


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
        lambda ps: Adafactor(ps, lr=0.1, relative_step=False, scale_parameter=False),
        lambda ps: Adafactor(ps),
    ],
    ids=["adamw", "adamw-fused", "sgd", "adagrad", "adafactor", "adafactor-relative"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_optimiser_does_what_it_does_with_the_release(make: Callable[..., Any], dtype: torch.dtype) -> None:
    params, plain = parameters(dtype), parameters(dtype)
    optimizer, reference = private(make(params)), make(plain)
    noise = dpft.GaussianNoise(SECRET)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for seed in range(4):
        give(params, signals(seed, dtype))
        optimizer.step()
        optimizer.zero_grad()
        for p, s in zip(plain, signals(seed, dtype), strict=True):
            p.grad = (noise.add_(s.to(wide), SIGMA * C) / B).to(dtype)
        reference.step()
    assert same(params, plain)
    assert not same(params, parameters(dtype))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1)


def test_state_dict_round_trip_continues_bitwise() -> None:
    params = parameters()
    optimizer = private(adamw(params))
    noise = dpft.GaussianNoise(SECRET)
    for seed in range(2):
        give(params, signals(seed))
        optimizer.step()
        optimizer.zero_grad()
        for s in signals():
            noise.add_(s, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    text = repr(state)
    assert "state" in state and "noise" not in text and SECRET.decode() not in text
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = private(adamw(copies), noise=noise)
    other.load_state_dict(state)
    assert other.param_groups is other.inner.param_groups and other.state is other.inner.state
    for seed in range(2, 4):
        for ps, o in ((params, optimizer), (copies, other)):
            give(ps, signals(seed))
            o.step()
            o.zero_grad()
    assert same(params, copies) and not same(params, parameters())
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    lost = private(adamw(fresh), noise=dpft.GaussianNoise(SECRET))
    assert not lost.state and optimizer.state[params[0]]["step"] == 4


def test_accelerate_prepares_and_saves_it() -> None:
    params = parameters()
    optimizer = private(adamw(params))
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer) and prepared.optimizer is optimizer
    give(params, signals())
    prepared.step()
    prepared.zero_grad()
    assert optimizer.releases == 1 and params[0].grad is None
    assert prepared.state_dict()["state"][0]["step"] == 1
    before = snapshot(params)
    for group in prepared.param_groups:
        group["lr"] = 0.0
    give(params, signals())
    prepared.step()
    assert optimizer.releases == 2
    assert same(params, before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["lambda", "transformers"])
def test_schedulers_act_on_the_inner_optimiser(kind: str, when: str) -> None:
    params = parameters()
    inner = sgd(params)

    def schedule(o: torch.optim.Optimizer) -> Any:
        if kind == "lambda":
            return LambdaLR(o, lambda n: 1 / (n + 1))
        return get_scheduler("linear", o, num_warmup_steps=0, num_training_steps=4)

    scheduler = schedule(inner) if when == "before" else None
    optimizer = private(inner, noise_multiplier=0)
    scheduler = scheduler or schedule(optimizer)
    for factor in [1, 1 / 2, 1 / 3, 1 / 4] if kind == "lambda" else [1, 0.75, 0.5, 0.25]:
        before = snapshot(params)
        give(params, signals())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for p, w, s in zip(params, before, signals(), strict=True):
            torch.testing.assert_close(p.detach(), w - factor * s / B)


def test_param_groups_may_be_added_at_any_time() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype)
        optimizer = private(sgd(params[:1]))
        give(params[:1], signals(2, dtype)[:1])
        optimizer.step()
        optimizer.add_param_group({"params": params[1:], "lr": 0.5})
        optimizer.zero_grad()
        assert optimizer.param_groups is optimizer.inner.param_groups and len(optimizer.param_groups) == 2
        before = snapshot(params)
        give(params, signals(3, dtype))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in params)
        optimizer.step()
        assert not any((p == w).all() for p, w in zip(params, before, strict=True))


def test_frozen_parameters_are_left_alone() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = private(sgd(params))
    before = snapshot(params)
    optimizer.step()
    assert torch.equal(params[1], before[1]) and params[1].grad is None
    assert not torch.equal(params[0], before[0])


def test_a_parameter_frozen_after_backward_is_not_released_without_noise() -> None:
    """The inner optimiser steps on whatever has a `.grad`, whether it requires one or not."""
    params = parameters()
    optimizer = private(sgd(params))
    before = snapshot(params)
    give(params, signals())
    params[1].requires_grad_(False)
    with contextlib.suppress(WrapError):
        optimizer.step()
    assert torch.equal(params[1], before[1])


def test_the_inner_optimiser_alone_does_not_step() -> None:
    """The old name in a training loop would release the sum without noise and without a line in the ledger."""
    params = parameters()
    inner = sgd(params)
    optimizer = private(inner)
    before = snapshot(params)
    give(params, signals())
    with pytest.raises(WrapError):
        inner.step()
    assert same(params, before)
    optimizer.step()
    assert not same(params, before)
