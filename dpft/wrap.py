"""``wrap``: checks coverage, attaches rules and makes the loss per-example; ``unwrap`` undoes it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpft.clipping.boundary import clip_boundary
from dpft.clipping.clip_groups import ClipGroupsSpec, make_groups
from dpft.clipping.factors import SMALLEST_BOUND, ClipFunction, ClipRule
from dpft.clipping.guard import guard_parameters
from dpft.clipping.passes import BookKeeping
from dpft.clipping.state import Clipping, ClipState, ClipStats, Isolation
from dpft.clipping.strategy_choice import Strategy, describe_uses
from dpft.errors import ClippingError, UnsupportedModuleError, WrapError
from dpft.kernels.impl import Impl
from dpft.models.causal_lm import (
    find_causal_lm,
    per_example_causal_lm_losses,
    uses_loss_function,
)
from dpft.models.forward import COMPILED, clipped_forward, refuse_unsaved_rng
from dpft.models.head import Head, leaves_logits_alone
from dpft.models.sites import HEAD, SITE, head_forward, replace_forward, site_forward
from dpft.rules.base import LinearUse
from dpft.rules.cover import batch_quantised, cover, refuse_mixing
from dpft.rules.head import HeadUse
from dpft.rules.linear import LinearRule
from dpft.rules.plain_parameters import TrackedRule
from dpft.rules.registry import find_rule
from dpft.rules.row_by_row import GradSampleRule, RowByRowRule

_STATE, _LOSS = "_dpft_state", "_dpft_loss_owner"
LONG_CONTEXT = "_dpft_long_context"
"""Where a model has what :func:`dpft.long_context` installed."""
_FIXED: dict[str, Strategy] = {"ghost": "two_pass", "fast": "two_pass", "per_sample": "one_pass"}


def wrap(
    model: nn.Module,
    clipping: Clipping = "flash",
    max_grad_norm: float = 1.0,
    strategy: Strategy | Literal["auto"] = "auto",
    clip_function: ClipFunction = "abadi",
    clip_gamma: float = 0.01,
    memory: int | None = None,
    loss_chunk: int | Literal["auto"] | None = "auto",
    impl: Impl = "auto",
    isolation: Isolation = "default",
    clip_groups: ClipGroupsSpec | None = None,
) -> nn.Module:
    """Make ``model`` produce clipped sums of per-example gradients, in place.

    Afterwards ``model(**batch).loss`` of a model of transformers is the mean of the per-example losses, and its
    ``backward()`` accumulates ``sum_i c_i grad_i`` in ``.grad``. For other models compute per-example losses ``[B]``
    and call :func:`clipped_loss`. A batch may contain ``example_weight [B]``, 0 for a padding row.

    Args:
        model: any ``nn.Module`` whose trainable layers have rules (Linear, Embedding, LayerNorm, RMSNorm families,
            Conv1D of GPT-2, experts of transformers, LoRA factors); with ``strategy="per_example"`` any module at all.
        clipping: ``"flash"`` (dpft picks per layer among gram tiles, feature tiles and materialising),
            ``"ghost"`` (full Gram, two passes: the published baseline), ``"fast"`` (one layer's gradients materialised
            at a time, two passes), ``"per_sample"`` (all per-example gradients at once), ``"none"`` (no clipping: NOT
            private, for comparison). All give the same clipped sum where they clip.
        max_grad_norm: C > 0, bound on the L2 norm of one example's contribution.
        strategy: ``"auto"``, ``"one_pass"``, ``"two_pass"`` or ``"per_example"``.
        clip_function: ``"abadi"`` (``min(1, C/norm)``) or ``"automatic"`` (``C/(norm + gamma)``).
        clip_gamma: gamma of ``"automatic"``.
        memory: bytes that one-pass may keep beyond one gradient; None lets it use up to half of the free memory.
            With ``dpft.plan(...).allowance``, ``"auto"`` chooses the planned strategy.
        loss_chunk: tokens per chunk in which a causal LM's head and loss are computed (``clipping="flash"``);
            ``out.logits`` is then computed when read. ``"auto"`` chooses; None computes all logits at once, as
            plain training does, and so do heads other than an ``nn.Linear`` and logits that are scaled or capped.
            With ``clipping="none"`` only a number has an effect.
        impl: of the norm kernels of linear layers: ``"torch"``, ``"triton"``, or ``"auto"``, which uses torch: the
            Triton kernels were not measured on a GPU yet. One that is named never falls back.
        isolation: how often one random row is also run alone, and must have the loss, or the outputs, that it has in
            the batch: ``"default"`` at backward 1, 2, 4, 8, ...; ``"every_step"``; ``"off"``. It costs a forward of
            one row, and, of a model with dropout, one of the batch in eval mode.
        clip_groups: parameters that are clipped apart from each other, so that a group's gradients are weighted and
            freed while the backward goes on: ``"layer"``, each module's own parameters to ``C / sqrt(number of
            them)``; or a weight for each beginning of parameters' names, to which the group's norm is proportional.
            The squares of the groups' norms add up to C^2, so that the sensitivity is C. One pass, or one example at a
            time.

    Returns:
        The same object.

    Raises:
        ValueError: a value out of range, or a strategy that contradicts the clipping mode.
        UnsupportedModuleError: a trainable parameter without a rule, or a layer that mixes examples.
        WrapError: the model is wrapped already.
    """
    if clipping not in ("flash", "ghost", "fast", "per_sample", "none"):
        raise ValueError(f"clipping is {clipping!r}; expected 'flash', 'ghost', 'fast', 'per_sample' or 'none'")
    if strategy not in ("auto", "one_pass", "two_pass", "per_example"):
        raise ValueError(f"strategy is {strategy!r}; expected 'auto', 'one_pass', 'two_pass' or 'per_example'")
    fixed = _FIXED.get(clipping)
    if fixed is not None and strategy not in ("auto", fixed):
        raise ValueError(f"clipping={clipping!r} is {fixed} by definition; got strategy={strategy!r}. Leave it 'auto'")
    for path, module in model.named_modules():
        if _STATE in module.__dict__ or SITE in module.__dict__:
            raise WrapError(f"{path or 'the model'!r} is wrapped already; call dpft.unwrap on it first")
    if type(model).__name__ == COMPILED:
        raise UnsupportedModuleError("the model is compiled (torch.compile); wrap the model it was made from instead")
    if not (loss_chunk in ("auto", None) or (type(loss_chunk) is int and loss_chunk > 0)):
        raise ValueError(f"loss_chunk is {loss_chunk!r}; expected a number of tokens >= 1, 'auto', or None")
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}; expected 'auto', 'torch' or 'triton'")
    if isolation not in ("every_step", "default", "off"):
        raise ValueError(f"isolation is {isolation!r}; expected 'every_step', 'default' or 'off'")
    rule = ClipRule(max_grad_norm, clip_function, clip_gamma)
    if max_grad_norm < SMALLEST_BOUND:
        raise ValueError(
            f"max_grad_norm is {max_grad_norm!r}; expected at least 2^-40: squares of such small gradients leave "
            "float32's range. Multiply each example's loss and max_grad_norm by one large number."
        )
    if clip_groups is not None:
        if clipping not in ("flash", "per_sample") or strategy == "two_pass":
            raise ValueError(
                f"clip_groups with clipping={clipping!r}, strategy={strategy!r}: groups are clipped in one pass; use "
                "clipping 'flash' or 'per_sample', with strategy 'auto', 'one_pass' or 'per_example'."
            )
        fixed = "one_pass"
    with _without_long_context(model):
        return _wrapped(model, clipping, rule, strategy, fixed, memory, loss_chunk, impl, isolation, clip_groups)


def _wrapped(
    model: nn.Module,
    clipping: Clipping,
    rule: ClipRule,
    strategy: Strategy | Literal["auto"],
    fixed: Strategy | None,
    memory: int | None,
    loss_chunk: int | Literal["auto"] | None,
    impl: Impl,
    isolation: Isolation,
    groups: ClipGroupsSpec | None,
) -> nn.Module:
    """:func:`wrap` with arguments that were checked."""
    refuse_mixing(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedModuleError("no parameter of the model requires a gradient; unfreeze what is to be trained")
    covered = clipping != "none" and strategy != "per_example"
    sites, missing = cover(model, parameters) if covered else ([], [])
    mixed = batch_quantised(model) if covered else []
    alone = bool(missing or mixed) and clipping == "flash" and strategy == "auto"
    if mixed and not alone:
        raise UnsupportedModuleError(
            f"{_reason_of_mixing(mixed)}. Or wrap with strategy='per_example', which runs one example at a time."
        )
    if missing and not alone:
        raise UnsupportedModuleError(
            f"{len(missing)} trainable parameters have no per-example gradient rule:\n  "
            + "\n  ".join(missing)
            + "\nWrap with strategy='per_example' (or 'auto'), which supports any architecture, write a rule "
            "(dpft.register_rule), or freeze them with requires_grad_(False)."
        )
    if alone:
        sites = []
    uses = [use for module, site_rule, keys in sites for use in site_rule.uses(module, keys)]
    chosen = strategy if strategy != "auto" else fixed or strategy
    state = ClipState(clipping, chosen, rule, memory, uses, parameters, impl=impl)
    state.clip_groups = None if groups is None else make_groups(groups, parameters)
    state.isolation = isolation
    state.generic = any(
        isinstance(site_rule, TrackedRule | GradSampleRule | RowByRowRule) for _, site_rule, _ in sites
    )
    if alone:
        state.run_one_by_one(_reason(missing) if missing else _reason_of_mixing(mixed))
    if clipping != "none":
        guard_parameters(state)
    causal_lm = find_causal_lm(model)
    state.catches_losses = not uses_loss_function(model, causal_lm)
    # Plain training keeps its logits, unless a number of tokens is asked for by name.
    in_chunks = clipping == "flash" or (clipping == "none" and loss_chunk != "auto")
    chunked = _chunked_head(causal_lm, model) if in_chunks and loss_chunk is not None else None
    for module, site_rule, keys in sites:
        module.__dict__[SITE] = (site_rule, state, keys)
        if module not in (model, chunked):
            replace_forward(module, site_forward)
    if chunked is not None:
        keys = chunked.__dict__.get(SITE, (None, None, {}))[2]
        chunked.__dict__[HEAD] = state.head = Head(
            state, keys, loss_chunk or "auto", leaves_logits_alone(getattr(causal_lm, "config", None))
        )
        replace_forward(chunked, head_forward)
        head_uses = [use for use in state.uses if isinstance(use, LinearUse) and use.key == keys.get("weight")]
        for use in head_uses:
            state.uses[state.uses.index(use)] = HeadUse(use.key, use.out_features, use.in_features)
    model.__dict__[_STATE] = state
    replace_forward(model, _model_forward)
    if causal_lm is not None:
        causal_lm.__dict__[_LOSS] = causal_lm.__dict__.get("_loss_function")
        setattr(causal_lm, "loss_function", per_example_causal_lm_losses)  # noqa: B010  # a property that torch cannot type
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Undo :func:`wrap` in place: the model computes, and trains, as it did before. Returns the same object.

    To get the optimiser back from a :class:`dpft.DPOptimizer`, call its ``detach()``.

    Raises:
        WrapError: the model is not wrapped.
    """
    model = _inner(model)
    with _without_long_context(model):
        return _unwrapped(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """:func:`unwrap` of the wrapped model itself."""
    for module in model.modules():
        if any(mark in module.__dict__ for mark in (SITE, HEAD, _STATE)):
            replaced = module.__dict__.pop("_dpft_replaced", None)
            del module.__dict__["forward"]
            if replaced is not None:
                module.__dict__["forward"] = replaced
            module.__dict__.pop(SITE, None)
            module.__dict__.pop(HEAD, None)
        if _LOSS in module.__dict__:
            before = module.__dict__.pop(_LOSS)
            module.__dict__.pop("_loss_function", None)
            if before is not None:
                module.loss_function = before
    state = model.__dict__.pop(_STATE)
    for hook in state.hooks:
        hook.remove()
    for p in state.parameters.values():
        if p.dtype == torch.float16 and p.grad is None:
            p.grad_dtype = p.dtype
    return model


def clipped_loss(model: nn.Module, losses: Tensor | Sequence[Tensor], example_weight: Tensor | None = None) -> Tensor:
    """The scalar loss whose backward computes the clipped sum, from per-example losses that the caller computed.

    Args:
        model: a wrapped model.
        losses: ``[B]`` per-example losses with their graph; example i's may depend only on row i of the batch.
            With ``strategy="per_example"`` a list of B scalars, each from a forward of its example alone.
        example_weight: ``[B]``, 0 for padding rows. None uses those passed to the model's forward, if any.

    Returns:
        ``[]`` float32, the mean of the losses over rows of positive weight.

    Raises:
        WrapError: the model is not wrapped, or its parameters changed.
        ClippingError: losses of the wrong shape.
    """
    model = _inner(model)
    state = get_state(model)
    state.check_parameters(model)
    if state.engine is not None and state.engine.sequence is not None:
        raise ClippingError(
            "under sequence parallelism the model computes its loss: pass labels [1, T] to its forward"
        )
    if example_weight is None and state.weights is not None:
        # The forward was given them: a padding row's loss must not count because the caller passed only losses.
        if len(state.weights) != len(losses):
            raise ClippingError(
                f"the last forward was given example_weight of shape {list(state.weights.shape)}, and there are "
                f"{len(losses)} losses; pass example_weight to dpft.clipped_loss, one weight per loss."
            )
        example_weight = state.weights
    state.weights_used = True  # and kept: a second loss of the same forward has the same padding rows
    if state.strategy == "per_example":
        if isinstance(losses, Tensor) and (losses.dim() != 1 or len(losses) > 1):
            raise ClippingError(
                f"got losses of shape {list(losses.shape)} from one forward; expected, with "
                "strategy='per_example', a list of B scalars, each from a forward of its own, since nothing is known "
                "about how this architecture treats its rows: losses = [loss_of(model(x[i : i + 1])) for i in "
                "range(len(x))]"
            )
        return clip_boundary(state, [x.reshape(()) for x in losses], example_weight, "per_example")
    refuse_unsaved_rng(state, model)
    if not isinstance(losses, Tensor):
        raise ClippingError(f"got losses as a {type(losses).__name__}; expected one tensor [B], from one forward")
    return clip_boundary(
        state, losses, example_weight, state.choose(losses.device, losses.numel(), state.seq_len).strategy
    )


def stats(model: nn.Module) -> ClipStats:
    """Norms and clip factors of the last clipped backward. They depend on private data: do not publish them.

    Raises:
        WrapError: the model is not wrapped, or no clipped backward has run.
    """
    last = get_state(_inner(model)).last
    if last is None:
        raise WrapError("no clipped backward has run yet; call backward on the loss first")
    return last


def book_keeping(model: nn.Module) -> BookKeeping:
    """The tensors that the running private backward holds beyond those of plain training, for measurements.

    Outside of a backward, only the last one's norms and factors. They depend on private data.

    Raises:
        WrapError: the model is not wrapped.
    """
    return get_state(model).book_keeping()


def explain(model: nn.Module, batch_size: int, seq_len: int) -> str:
    """How dpft processes a physical batch of ``batch_size`` examples of ``seq_len`` tokens, and why.

    Args:
        model: a wrapped model.
        batch_size: B.
        seq_len: T.

    Returns:
        Several lines: the strategy with its reason in numbers, then one line per kind of trainable matrix with its
        norm method and the bytes kept for it.

    Raises:
        WrapError: the model is not wrapped.
    """
    model = _inner(model)
    state = get_state(model)
    device = next(iter(state.parameters.values())).device
    choice = state.choose(device, batch_size, seq_len)
    itemsize = max(p.element_size() for p in state.parameters.values())
    lines = [f"clipping {state.clipping}, {choice.reason}"]
    if state.clip_groups is not None:
        return f"{lines[0]}; in {len(state.clip_groups)} clip groups, each weighted when its backward is complete"
    if state.clipping == "flash" and choice.strategy != "per_example":
        lines += describe_uses(state.uses, choice.strategy, batch_size, seq_len, itemsize)
    return "\n".join(lines)


def get_state(model: nn.Module) -> ClipState:
    """The state of a wrapped model, or WrapError."""
    state = _inner(model).__dict__.get(_STATE)
    if state is None:
        raise WrapError("the model is not wrapped; call dpft.wrap(model) first")
    assert isinstance(state, ClipState)
    return state


@contextlib.contextmanager
def _without_long_context(model: nn.Module) -> Iterator[None]:
    """A context without the tiles of :func:`dpft.long_context`, which go around the sites: off before, on after."""
    installed = [m.__dict__[LONG_CONTEXT] for m in model.modules() if LONG_CONTEXT in m.__dict__]
    for each in installed:
        each.suspend()
    try:
        yield
    finally:
        for each in installed:
            each.resume()


def _inner(model: nn.Module) -> nn.Module:
    """The wrapped model inside an engine's wrapper."""
    while _STATE not in model.__dict__ and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]  # checked just above
    if _STATE not in model.__dict__:
        raise WrapError("the model is not wrapped; call dpft.wrap(model) first")
    return model


def _reason(missing: list[str]) -> str:
    """Why, and at what price, examples are processed one by one."""
    return (
        f"{len(missing)} trainable parameters have no rule ({missing[0]}{', ...' if len(missing) > 1 else ''}). With "
        "one (dpft.register_rule), or with them frozen, the examples of a batch would be processed together"
    )


def _reason_of_mixing(mixed: list[str]) -> str:
    """Why a quantised model's examples cannot be processed together."""
    return f"{len(mixed)} layers quantise their input over the whole batch ({mixed[0]})"


def _chunked_head(causal_lm: nn.Module | None, model: nn.Module) -> nn.Module | None:
    """The output layer whose loss can be computed in chunks: a plain ``nn.Linear``; else None."""
    head = None if causal_lm is None else getattr(causal_lm, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or head is model or not isinstance(find_rule(head), LinearRule):
        return None
    return head


def _model_forward(model: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if SITE in model.__dict__:  # the wrapped model is itself one layer
        plain = functools.partial(site_forward, model, plain)
    return clipped_forward(model.__dict__[_STATE], model, plain, args, kwargs)
