"""What the tests of clipping share: a cached oracle per case, one private backward, and the house's tolerances."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dpft
from tests import oracle, zoo

CHECKPOINTING = ("off", "non-reentrant", "reentrant")
STRATEGIES = ("one_pass", "two_pass", "per_example")
MODES = ("flash", "ghost", "fast", "per_sample", "none")
FLOAT32_LIMIT = 1e-5
"""Relative error of the whole gradient in float32, from the specification."""
OF_PLAIN = 2.0
"""Our error may be at most this multiple of plain PyTorch's in the same precision (STYLE.md, 5)."""

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def autocast() -> contextlib.AbstractContextManager[Any]:
    """Mixed precision as Accelerate sets it on a CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A model, a batch, and what float64 and plain PyTorch say about them."""

    entry: zoo.Entry
    build: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    exact: oracle.PerExample
    context: Context
    float32: bool

    @functools.cached_property
    def max_grad_norm(self) -> float:
        """Between the examples' norms: some are clipped, some are not."""
        norms = self.exact.norms
        norms = norms[norms.isfinite() & (norms > 0)]
        return float(norms.median()) * 1.001 if len(norms) else 1.0

    @functools.cached_property
    def plain(self) -> nn.Module:
        return self.build()

    @functools.cached_property
    def plain_norm_error(self) -> float:
        return oracle.plain_norm_error(self.plain, self.batch, self.exact, self.entry.losses, self.context)

    def limit(self, factors: Tensor) -> float:
        """The largest relative error that is allowed for the sum with these factors."""
        error = _plain_error(self, tuple(factors.tolist()))
        return min(FLOAT32_LIMIT, OF_PLAIN * error) if self.float32 else OF_PLAIN * error

    def __hash__(self) -> int:
        return id(self)


@functools.cache
def _plain_error(case: Case, factors: tuple[float, ...]) -> float:
    return oracle.plain_error(
        case.plain, case.batch, case.exact, case.entry.losses, torch.tensor(factors).double(), case.context
    )


def make_case(
    entry: zoo.Entry,
    batch: Mapping[str, Tensor],
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    context: Context = contextlib.nullcontext,
) -> Case:
    """A case that is computed now."""

    def build() -> nn.Module:
        return entry.build(attention).to(dtype)

    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    exact = oracle.oracle(build(), cast, entry.losses)
    full = dtype == torch.float32 and context is contextlib.nullcontext
    return Case(entry, build, cast, exact, context, full)


@functools.cache
def case_of(
    entry: zoo.Entry,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    context: Context = contextlib.nullcontext,
    **batch: Any,
) -> Case:
    """The cached case of a zoo entry; `batch` goes to its batch maker."""
    return make_case(entry, entry.batch(**batch), attention, dtype, context)


def set_checkpointing(model: nn.Module, how: str) -> None:
    """Activation checkpointing as a user of Hugging Face turns it on."""
    if how == "off":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
        if how == "reentrant" and not model.get_input_embeddings().weight.requires_grad:
            model.enable_input_require_grads()  # plain training needs it too


def clipped_loss(
    model: nn.Module,
    losses_of: oracle.LossesOf,
    batch: Mapping[str, Tensor],
    strategy: str,
    example_weight: Tensor | None = None,
) -> Tensor:
    """`dpft.clipped_loss` as its strategy wants it: from one forward, or from one forward of each example."""
    if strategy == "per_example":
        each = [losses_of(model, oracle.row(batch, i))[0] for i in range(oracle.size(batch))]
        return dpft.clipped_loss(model, each, example_weight)
    return dpft.clipped_loss(model, losses_of(model, batch), example_weight)


def private_loss(
    entry: zoo.Entry,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    strategy: str,
    example_weight: Tensor | None = None,
) -> Tensor:
    """The scalar that the user calls `backward` on."""
    if entry.causal:
        weight = {} if example_weight is None else {"example_weight": example_weight}
        return model(**batch, **weight).loss
    return clipped_loss(model, entry.losses, batch, strategy, example_weight)


def check_grads(case: Case, model: nn.Module, factors: Tensor, scale: float = 1.0) -> None:
    """`.grad` is scale * sum_i factors_i * grad_i within the tolerances."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.requires_grad, f"{name} is frozen but has a gradient"
            assert p.grad.dtype == p.dtype and p.grad.shape == p.shape, name
            assert p.grad.isfinite().all(), name
    grads = {n: g.double() / scale for n, g in oracle.grads_of(model).items()}
    expected = case.exact.weighted_sum(factors)
    error = oracle.relative_error(grads, expected)
    limit = case.limit(factors) if any(factors) else 0.0
    if error > limit:
        wrong = {n: oracle.relative_error({n: grads[n]}, {n: expected[n]}) for n in expected}
        worst = sorted(wrong.items(), key=lambda item: -item[1])[:6]
        raise AssertionError(f"relative error {error:.3g} > {limit:.3g}; worst parameters: {worst}")


def check_stats(case: Case, model: nn.Module, **clip: Any) -> None:
    """Norms and clip factors [B], float32, as the oracle has them."""
    stats = dpft.stats(model)
    exact, factors = case.exact.norms, case.exact.factors(case.max_grad_norm, **clip)
    assert stats.norms.shape == stats.clip_factors.shape == exact.shape
    assert stats.norms.dtype == stats.clip_factors.dtype == torch.float32
    if case.float32:
        rtol = min(FLOAT32_LIMIT, max(OF_PLAIN * case.plain_norm_error, 1e-6))
    else:
        rtol = OF_PLAIN * case.plain_norm_error
    torch.testing.assert_close(stats.norms.double(), exact, rtol=rtol, atol=0.0)
    torch.testing.assert_close(stats.clip_factors.double(), factors, rtol=rtol, atol=0.0)


def check(case: Case, checkpointing: str = "off", **wrap: Any) -> nn.Module:
    """Wraps a fresh model, runs one backward, compares everything with the oracle; returns the model."""
    model = case.build()
    set_checkpointing(model, checkpointing)
    clip = {k: v for k, v in wrap.items() if k in ("clip_function", "clip_gamma")}
    assert dpft.wrap(model, **{"max_grad_norm": case.max_grad_norm, **wrap}) is model
    with case.context():
        loss = private_loss(case.entry, model, case.batch, wrap.get("strategy", "auto"))
    assert loss.ndim == 0 and loss.dtype == torch.float32
    loss_rtol = 1e-5 if case.float32 else 2e-2
    torch.testing.assert_close(loss.detach().double(), case.exact.losses.mean(), rtol=loss_rtol, atol=1e-12)
    loss.backward()
    if wrap.get("clipping") == "none":
        check_grads(case, model, torch.ones(oracle.size(case.batch)))
    else:
        check_grads(case, model, case.exact.factors(case.max_grad_norm, **clip))
        check_stats(case, model, **clip)
    return model
