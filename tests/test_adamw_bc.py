"""`AdamWBC`: AdamW with the variance of the noise subtracted from its second moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.errors import EngineError, WrapError
from tests.summed import SIGMA, B, C, give, parameters, private, releases, same, signals, snapshot
from tests.training import Training, values

PHI = (SIGMA * C / B) ** 2
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "floor": 0.2}


def corrected(
    weights: list[Tensor], steps: list[list[Tensor]], variances: list[float], eps: float = 1e-8
) -> list[Tensor]:
    """The weights after these gradients, written out in float64: sums over all earlier steps, no running averages."""
    lr, (beta1, beta2), decay = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["weight_decay"]
    found = [w.double() for w in weights]
    for t in range(1, len(steps) + 1):
        for k in range(len(found)):
            grads = [step[k].double() for step in steps[:t]]
            m = sum((1 - beta1) * beta1 ** (t - 1 - i) * g for i, g in enumerate(grads)) / (1 - beta1**t)
            v = sum((1 - beta2) * beta2 ** (t - 1 - i) * g * g for i, g in enumerate(grads)) / (1 - beta2**t)
            noise = sum((1 - beta2) * beta2 ** (t - 1 - i) * phi for i, phi in enumerate(variances[:t]))
            kept = (v - noise / (1 - beta2**t)).clamp(min=OPTIONS["floor"] * variances[t - 1])
            found[k] = found[k] - lr * decay * found[k] - lr * m / (kept.sqrt() + eps)
    return found


def test_steps_are_those_of_the_written_out_formula() -> None:
    params, sums = parameters(), [signals(seed) for seed in range(6)]
    before = snapshot(params)
    optimizer = private(dpft.AdamWBC(params, **OPTIONS))
    for step in sums:
        give(params, step)
        optimizer.step()
        optimizer.zero_grad()
    want = corrected(before, releases(*sums), [PHI] * 6)
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)
    uncorrected = corrected(before, releases(*sums), [1e-30] * 6)
    assert not torch.allclose(params[0].detach().double(), uncorrected[0], rtol=1e-2)


def test_a_clip_norm_that_changes_is_followed() -> None:
    """As with an adaptive one: each step subtracts the variance of its own noise."""
    params, norms = parameters(), [1.3, 0.4, 2.0, 0.9]
    before = snapshot(params)
    optimizer = private(dpft.AdamWBC(params, **OPTIONS))
    noise, grads = dpft.GaussianNoise(b"noise of the tests of the optimiser"), []
    for norm in norms:
        optimizer.max_grad_norm = norm
        optimizer.step()
        optimizer.zero_grad()
        grads.append([noise.add_(torch.zeros_like(p), SIGMA * norm) / B for p in params])
    want = corrected(before, grads, [(SIGMA * norm / B) ** 2 for norm in norms])
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("secure", [False, True])
def test_of_noise_alone_nothing_is_left(secure: bool) -> None:
    """The law: with a gradient of zero the second moment, without the correction Phi, is zero in expectation."""
    if secure:
        pytest.importorskip("cryptography")
    p, beta, steps = nn.Parameter(torch.zeros(20_000)), 0.95, 100
    inner = dpft.AdamWBC([p], lr=0.0, betas=(0.9, beta))
    optimizer = private(inner, noise=dpft.GaussianNoise(secure=secure))
    for _ in range(steps):
        optimizer.step()
        optimizer.zero_grad()
    left = inner.state[p]["exp_avg_sq"].double() / (1 - beta**steps) / PHI
    spread = math.sqrt(2 * (1 - beta) / (1 + beta))  # of an average of squares of N(0, 1)
    assert abs(left.mean()) < 5 * spread / math.sqrt(p.numel())
    assert left.std() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("mechanism", ["bandmf", "blt"])
def test_of_correlated_noise_alone_nothing_is_left(mechanism: str, tmp_path: Path) -> None:
    """Whose variance is smaller in the first steps: Phi follows from the row of C^-1."""
    changes: dict[str, Any] = {"num_steps": 4, "expected_batch_size": 3}
    changes |= (
        {"mechanism": "bandmf", "bands": 4, "sampler": "cyclic_poisson"}
        if mechanism == "bandmf"
        else {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"}
    )
    held: list[Any] = []

    def make(trained: list[nn.Parameter]) -> Any:
        held.append(dpft.AdamWBC(trained, lr=0.0, betas=(0.0, 0.0)))  # the second moment is of one step
        return held[0]

    training = Training(tmp_path / "ledger.jsonl", make=make, changes=changes)
    variances, shares = [], []
    inner = held[0]
    told = inner.register_step_pre_hook(lambda *_: variances.append(inner.noise_variance))
    for _ in training.physical():
        if training.loader.is_last:
            squares = torch.cat([inner.state[p]["exp_avg_sq"].flatten() for p in inner.param_groups[0]["params"]])
            shares.append(float(squares.double().mean()) / variances[-1])
    told.remove()
    training.close()
    schedule = training.run.schedule
    z = (schedule.noise_multiplier * schedule.max_grad_norm * schedule.strategy.scale / 3) ** 2
    assert variances[0] == pytest.approx(z) and variances[1] > 1.05 * z
    # what is left is the clipped sums' own squares, far below the noise's: at most C^2 of 3 examples on all elements
    assert all(abs(share) < 0.1 for share in shares), shares


def test_without_noise_it_is_adamw() -> None:
    params, plain = parameters(), parameters()
    optimizer = private(dpft.AdamWBC(params, **OPTIONS), noise_multiplier=0.0)
    other = torch.optim.AdamW(plain, **{k: v for k, v in OPTIONS.items() if k != "floor"})
    for seed in range(5):
        give(params, signals(seed))
        give(plain, [s / B for s in signals(seed)])
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_resume_is_bitwise_the_same() -> None:
    sums = [signals(seed) for seed in range(6)]

    def train(optimizer: Any, params: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
        for step in steps:
            give(params, step)
            optimizer.step()
            optimizer.zero_grad()

    noise = dpft.GaussianNoise(b"one stream")
    whole = parameters()
    train(private(dpft.AdamWBC(whole, **OPTIONS), noise=noise), whole, sums)
    noise, halved = dpft.GaussianNoise(b"one stream"), parameters()
    first = private(dpft.AdamWBC(halved, **OPTIONS), noise=noise)
    train(first, halved, sums[:3])
    again = private(dpft.AdamWBC(halved, lr=0.1), noise=noise)
    again.load_state_dict(first.state_dict())
    train(again, halved, sums[3:])
    assert same(whole, halved)


def test_the_state_is_made_before_a_checkpoint_is_loaded() -> None:
    """As torch.distributed.checkpoint does it, where an engine has the sums: a step on zeros at a rate of zero."""

    class Sums:
        def __init__(self, p: nn.Parameter) -> None:
            self.parameters = {"weight": p}

        def discard(self) -> None:
            pass

    p = nn.Parameter(torch.ones(3))
    inner = dpft.AdamWBC([p], lr=0.0)
    optimizer = private(inner, sums=Sums(p))
    p.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.releases == 0 and torch.equal(p.detach(), torch.ones(3))
    assert inner.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} and not inner.state[p]["exp_avg_sq"].any()
    with pytest.raises(WrapError, match="does not know the variance"):
        optimizer._step_inner()


def test_what_it_cannot_correct_is_refused(tmp_path: Path) -> None:
    p = nn.Parameter(torch.zeros(3))
    alone = dpft.AdamWBC([p])
    p.grad = torch.ones(3)
    with pytest.raises(WrapError, match="does not know the variance of the noise"):
        alone.step()
    with pytest.raises(ValueError, match=r"\[3\] is torch.bfloat16"):
        dpft.AdamWBC([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])
    for wrong in ({"floor": 0.0}, {"lr": -1.0}, {"eps": math.inf}):
        with pytest.raises(ValueError, match=f"AdamWBC: {next(iter(wrong))}="):
            dpft.AdamWBC([p], **wrong)
    with pytest.raises(ValueError, match="AdamWBC: betas="):
        dpft.AdamWBC([p], betas=(0.9, 1.0))
    with pytest.raises(EngineError, match="AdamWBC computes the same steps"):
        Training(tmp_path / "ledger.jsonl", make=lambda trained: dpft.AdamWBC(trained), sums_device="cpu")


def test_prepare_tells_it_the_variance(tmp_path: Path) -> None:
    """Of the clip norm that adapts, too: every step's own."""
    held: list[Any] = []

    def make(trained: list[nn.Parameter]) -> Any:
        held.append(dpft.AdamWBC(trained, lr=0.01))
        return held[0]

    changes = {"adaptive_clip": dpft.AdaptiveClip(learning_rate=0.5), "num_steps": 4}
    training = Training(tmp_path / "ledger.jsonl", make=make, changes=changes)
    inner, told, norms = held[0], [], []

    def look(*_: Any) -> None:
        told.append(inner.noise_variance)
        norms.append(training.optimizer.optimizer.max_grad_norm)

    inner.register_step_pre_hook(look)
    before = values(training.model)
    training.train()
    training.close()
    sigma = training.run.schedule.sum_noise_multiplier
    assert told == pytest.approx([(sigma * norm / 6) ** 2 for norm in norms])
    assert len(set(norms)) == 4 and not torch.equal(before, values(training.model))
