"""The wrapped model's forward: per-example losses behind the boundary, or one forward per example."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpft.clipping.boundary import clip_boundary, mean_loss
from dpft.clipping.guard import guard_parameters
from dpft.clipping.state import ClipState
from dpft.errors import ClippingError
from dpft.models.head import joined
from dpft.models.isolation import RowCheck
from dpft.models.rows import row_of
from dpft.rules.groups import Groups, even_groups, groups_of

COMPILED = "OptimizedModule"  # by name, so that torch._dynamo need not be imported for it


def clipped_forward(
    state: ClipState, model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``plain`` and, if labels are passed, put the clip boundary on its per-example losses.

    Args:
        state: of ``model``.
        model: the wrapped model.
        plain: its forward as it was before wrapping.
        args: of the call.
        kwargs: of the call; ``example_weight [B]``, ``example_ids [R]`` and ``rows_per_example`` are removed.

    Raises:
        WrapError: the trainable parameters changed since ``wrap``.
        ClippingError: a submodule is compiled; or labels were passed and the model computed a loss of its own.
    """
    weights, groups = kwargs.pop("example_weight", None), _take_groups(args, kwargs)
    if not torch.is_grad_enabled():
        with _expecting(state, kwargs):
            out = plain(*args, **kwargs)
        return _with_loss(out, lambda losses: mean_loss(_of_examples(losses, groups), weights), kwargs)
    state.check_parameters(model)
    refuse_compiled(state, model)
    if state.clipping != "none" and state.engine is None:
        guard_parameters(state)
    shape = _batch_shape(args, kwargs)
    if shape is None:
        return plain(*args, **kwargs)
    state.begin(shape, groups)
    try:
        if kwargs.get("labels") is None:
            _hold_weights(state, weights)
            run = functools.partial(_run_expecting, state, plain)
            with RowCheck.of_next(state, model, run, args, kwargs, shape[0]) as check:
                out = plain(*args, **kwargs)
            _refuse_own_loss(out, kwargs)
            check.compare(out)
            return out
        device = next(iter(state.parameters.values())).device
        examples = shape[0] if groups is None else groups.examples
        choice = state.choose(device, examples, state.seq_len).strategy
        if choice == "per_example":
            return _forward_each(state, plain, args, kwargs, weights, shape[0], groups)
        if choice == "two_pass":
            refuse_unsaved_rng(state, model)
        run = functools.partial(_run_expecting, state, plain)
        with RowCheck.of_next(state, model, run, args, kwargs, shape[0]) as check:
            out = run(*args, **kwargs)
        check.compare(out)

        def reduced(losses: Tensor) -> Tensor:
            return clip_boundary(state, _of_examples(losses, groups), weights, choice)

        return _with_loss(out, reduced, kwargs)
    finally:
        state.end()


def _run_expecting(state: ClipState, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward, whose head computes its losses with the call's labels where it can."""
    with _expecting(state, kwargs):
        return plain(*args, **kwargs)


def _expecting(state: ClipState, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """A context in which the head computes its losses with the call's labels, if it can."""
    if state.head is None or kwargs.get("shift_labels") is not None or state.groups is not None:
        return nullcontext()
    return state.head.expecting(kwargs.get("labels"))


def _hold_weights(state: ClipState, weights: Tensor | None) -> None:
    """Keep the weights of a forward without labels for the ``clipped_loss`` that is to come."""
    if state.weights_used:
        state.weights, state.weights_used = None, False
    held = state.weights
    if weights is None:
        return
    if held is not None and not (held.shape == weights.shape and torch.equal(held, weights.to(held.device))):
        raise ClippingError(
            "two forwards before one clipped_loss got different example_weight; a row must be padding in both or in "
            "neither. Pass the same weights to both."
        )
    state.weights = weights


def _refuse_own_loss(out: Any, kwargs: dict[str, Any]) -> None:
    """A loss that the model computed from other targets than ``labels`` is a mean over the batch.

    Raises:
        ClippingError: names the arguments.
    """
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        given = sorted(name for name, value in kwargs.items() if value is not None)
        raise ClippingError(
            f"the model computed a loss by itself from {', '.join(given)}: a mean over the batch, which cannot be "
            "clipped by example. Leave the targets (start_positions, end_positions, ...) out, compute losses [B] from "
            "the outputs with reduction='none', and call dpft.clipped_loss(model, losses)."
        )


def refuse_compiled(state: ClipState, model: nn.Module) -> None:
    """Refuse a model with a compiled submodule, in whose backward no rule sees a gradient.

    ``torch.compile`` around the wrapped model is harmless: the model's forward runs uncompiled.

    Raises:
        ClippingError: names the module.
    """
    if state.strategy == "per_example" or state.clipping == "none":
        return
    for name, module in model.named_modules():
        if (module._compiled_call_impl is not None and module is not model) or type(module).__name__ == COMPILED:
            raise ClippingError(
                f"{name!r} is compiled (torch.compile), so no per-example norm can be computed in its backward. "
                "Do not compile the model's submodules, or wrap with strategy='per_example'."
            )


def refuse_unsaved_rng(state: ClipState, model: nn.Module) -> None:
    """Refuse checkpointing that does not restore the RNG: both passes must draw the forward's dropout masks.

    Raises:
        ClippingError: transformers' checkpointing with ``preserve_rng_state=False``, and two passes may run.
    """
    if state.strategy == "one_pass":
        return
    for module in model.modules():
        keywords = getattr(module.__dict__.get("_gradient_checkpointing_func"), "keywords", None) or {}
        if not keywords.get("preserve_rng_state", True):
            raise ClippingError(
                "gradient checkpointing runs with preserve_rng_state=False: with dropout the norm pass and the "
                "weighted pass would see different gradients. Use preserve_rng_state=True, or strategy='one_pass'."
            )


def _with_loss(out: Any, reduce: Callable[[Tensor], Tensor], kwargs: dict[str, Any]) -> Any:
    """``out`` with its per-example losses reduced to the scalar that the user sees."""
    if kwargs.get("labels") is None:
        return out
    losses = out[0] if isinstance(out, tuple) else getattr(out, "loss", None)
    batch = kwargs["labels"].shape[0]
    ours = isinstance(losses, Tensor) and losses.dim() == 1 and len(losses) == batch
    if not ours and not torch.is_grad_enabled():
        return out
    if not ours:
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ClippingError(
            f"the model computed its own loss from labels (got {got}; expected per-example losses [{batch}] from "
            "model.loss_function): a mean over the batch, or a loss with a term that mixes examples, cannot be "
            "clipped. Omit labels, compute losses [B] from the outputs, and call dpft.clipped_loss(model, losses)."
        )
    assert isinstance(losses, Tensor)
    loss = reduce(losses)
    if isinstance(out, tuple):
        return (loss, *out[1:])
    out["loss"] = loss
    return out


def _take_groups(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Groups | None:
    """The rows of each example, where the call says that one has several.

    Raises:
        ClippingError: ids or a number that do not fit the rows.
    """
    ids, each = kwargs.pop("example_ids", None), kwargs.pop("rows_per_example", None)
    shape = _batch_shape(args, kwargs)
    if shape is None or (ids is None and each is None):
        return None
    if ids is not None:
        return groups_of(ids, shape[0])
    if not isinstance(each, int) or each < 1 or shape[0] % each:
        raise ClippingError(
            f"rows_per_example is {each!r} in a batch of {shape[0]} rows; expected a whole number that divides them"
        )
    return even_groups(shape[0] // each, each)


def _of_examples(losses: Tensor, groups: Groups | None) -> Tensor:
    """``[B]`` losses of examples, from those of rows."""
    return losses if groups is None else groups.total(losses)


def _batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """Shape of the first tensor input, whose dimension 0 is the batch; None if there is none."""
    preferred = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "labels")]
    for value in (*preferred, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape
    return None


def _forward_each(
    state: ClipState,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Tensor | None,
    batch: int,
    groups: Groups | None,
) -> Any:
    """One forward per row, so that no architecture can mix them; the logits are concatenated, detached.

    The loss of an example of several rows is the sum of theirs.
    """

    kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    losses: list[Tensor] = []
    logits: list[Tensor] = []
    out: Any = None
    for i in range(batch):
        row = {k: row_of(v, i, batch, k) for k, v in kwargs.items()}
        with _expecting(state, row):
            out = plain(*(row_of(a, i, batch) for a in args), **row)
        loss = out[0] if isinstance(out, tuple) else out.loss
        losses.append(loss.reshape(()))
        found = out[1] if isinstance(out, tuple) else getattr(out, "logits", None)
        logits += [found.detach()] if isinstance(found, Tensor) else []  # lazy ones stay lazy
    if groups is not None:
        losses = [torch.stack([losses[r] for r in groups.of_example(i)]).sum() for i in range(groups.examples)]
    loss = clip_boundary(state, losses, weights, "per_example")
    together = joined(logits) if 0 < len(logits) == batch else None
    if isinstance(out, tuple):
        return (loss, together)
    assert out is not None
    return type(out)(loss=loss, logits=together)
