"""The wrapped model's forward: per-example losses behind the boundary, or one forward per example."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpft.clipping.boundary import clip_boundary, mean_loss
from dpft.clipping.coverage import check_coverage
from dpft.clipping.guard import guard_parameters
from dpft.clipping.state import ClipState, Split
from dpft.errors import ClippingError, UnsupportedModuleError
from dpft.models.head import joined
from dpft.models.inputs import batch_shape, row_tokens_of, take_groups
from dpft.models.isolation import RowCheck, is_due
from dpft.models.losses import WAY_OUT, ExampleLosses, LossError, PerExampleLosses, loss_of, with_loss
from dpft.models.rows import row_of
from dpft.models.targets import several_rows, targets_of
from dpft.rules.groups import Groups, even_groups

COMPILED = "OptimizedModule"  # by name, so that torch._dynamo need not be imported for it


def clipped_forward(
    state: ClipState, model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``plain`` and, if targets are passed, put the clip boundary on its per-example losses.

    Args:
        state: of ``model``.
        model: the wrapped model.
        plain: its forward as it was before wrapping.
        args: of the call.
        kwargs: of the call; ``example_weight [B]``, ``example_ids [R]``, ``rows_per_example`` and ``row_reduction``
            are removed.

    Raises:
        WrapError: the trainable parameters changed since ``wrap``.
        ClippingError: a submodule is compiled; or targets were passed, and the model computed a loss that cannot be
            computed per example.
    """
    weights, groups = kwargs.pop("example_weight", None), take_groups(args, kwargs)
    # In eval mode every rank runs the whole example: attention is then that of the rank alone.
    split = state.engine.sequence if state.engine is not None and model.training else None
    share: Tensor | None = None
    if split is not None:
        args, kwargs, share = _split(split, state, args, kwargs)
    elif state.engine is not None and state.engine.sequence is not None and torch.is_grad_enabled():
        raise ClippingError(
            "the model is in eval mode, in which the tokens of an example are not spread over ranks. Call "
            "model.train() to train it, and use torch.no_grad() to evaluate it."
        )
    if not torch.is_grad_enabled():
        with _expecting(state, kwargs):
            out = plain(*args, **kwargs)
        losses = _of_rows(out, kwargs)
        if losses is not None and split is not None and share is not None:
            losses = split.total(losses * share)
        return out if losses is None else with_loss(out, mean_loss(_of_examples(losses, groups), weights))
    state.check_parameters(model)
    refuse_compiled(state, model)
    if state.clipping != "none" and state.alone:
        guard_parameters(state)
    shape = batch_shape(args, kwargs)
    if shape is None:
        return plain(*args, **kwargs)
    try:
        each = None if state.strategy == "per_example" else several_rows(model, args, kwargs)
    except ClippingError as error:
        if not _may_run_one_by_one(state):
            raise
        state.run_one_by_one(f"Not together, since {error}")
        each = None
    row_tokens = row_tokens_of(args, kwargs, shape)
    if each is None:
        state.begin(shape, row_tokens, groups)
    elif groups is not None:
        raise ClippingError("example_ids with a model that itself takes several rows per example; leave them out")
    else:
        state.begin(torch.Size((shape[0] * each, *shape[2:])), row_tokens, even_groups(shape[0], each))
    try:
        targets = targets_of(kwargs)
        choice = None
        if targets:
            # A mean over the batch's tokens would make each example's gradient depend on the others.
            kwargs.pop("num_items_in_batch", None)
            device = next(iter(state.parameters.values())).device
            examples = shape[0] if groups is None else groups.examples
            choice = state.choose(device, examples, state.seq_len).strategy
            if choice == "per_example":
                return _forward_each(state, model, plain, args, kwargs, weights, shape[0], groups)
            if choice == "two_pass":
                refuse_unsaved_rng(state, model)
        run = functools.partial(_run, state, plain)
        try:
            _refuse_router_loss(model, kwargs)
            with RowCheck.of_next(state, model, run, args, kwargs, shape[0]) as check:
                out = run(*args, **kwargs)
            if choice is not None and not state.backwards:
                _look_ahead(state, out)
        except (ClippingError, UnsupportedModuleError) as error:
            if choice is None or isinstance(error, LossError) or not _may_run_one_by_one(state):
                raise
            state.run_one_by_one(f"Not together, since {error}")
            return _forward_each(state, model, plain, args, kwargs, weights, shape[0], groups)
        if choice is None or _has_no_loss(out, targets):
            _hold_weights(state, weights)
            _refuse_own_loss(out, kwargs)
            check.compare(out)
            return out
        check.compare(out)
        losses = _of_examples(_example_losses(out, shape[0], targets), groups)
        if share is not None:
            losses = losses * share
        return with_loss(out, clip_boundary(state, losses, weights, choice))
    finally:
        state.end()


def _split(
    split: Split, state: ClipState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The arguments of a forward for this rank's tokens, and the share of the example's loss that is theirs.

    Raises:
        ClippingError: losses that are not those of a causal LM, of tokens by tokens.
    """
    kwargs.pop("num_items_in_batch", None)
    if args or targets_of(kwargs).keys() - {"labels"} or (targets_of(kwargs) and state.catches_losses):
        raise ClippingError(
            "under sequence parallelism a model takes its inputs by keyword, and its only targets are the labels of a "
            f"causal LM; got {len(args)} positional arguments and {', '.join(sorted(targets_of(kwargs))) or 'none'}."
        )
    mine, share = split.split(kwargs)
    return args, mine, share


def _may_run_one_by_one(state: ClipState) -> bool:
    """Whether a forward that no rule covers may be repeated one example at a time, as nobody has said otherwise.

    Not under an engine, whose other ranks and gathered parameters are in the middle of this forward.
    """
    return state.strategy == "auto" and state.clipping == "flash" and state.alone


def _look_ahead(state: ClipState, out: Any) -> None:
    """Before the first backward: the checks of its graph that it begins with.

    Raises:
        UnsupportedModuleError: a parameter is used in another way than its rule sees.
    """
    losses = loss_of(out)
    if _may_run_one_by_one(state) and isinstance(losses, Tensor) and losses.requires_grad:
        check_coverage(losses, {id(p): name for name, p in state.parameters.items()})


def _refuse_router_loss(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse the auxiliary loss that balances the load of experts: it is one over all tokens of the batch.

    Raises:
        ClippingError: says how to turn it off.
    """
    asked = kwargs.get("output_router_logits")
    config = getattr(model, "config", None)
    if asked is None:
        asked = getattr(getattr(config, "get_text_config", lambda: None)() or config, "output_router_logits", False)
    if asked and targets_of(kwargs):
        raise ClippingError(
            "output_router_logits is on, which adds a load-balancing loss over all tokens of the batch, so that one "
            "example's gradient depends on the others. Set model.config.output_router_logits = False, or wrap with "
            "strategy='per_example', where each example is balanced by itself."
        )


def _run(state: ClipState, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward; with targets, its loss is the examples' losses ``[B]`` where they can be computed."""
    targets = targets_of(kwargs)
    shape = batch_shape(args, kwargs)
    if not targets or shape is None:
        return plain(*args, **kwargs)
    with _expecting(state, kwargs), _catching(state, kwargs, shape[0]):
        out = plain(*args, **kwargs)
    loss = loss_of(out)
    if isinstance(loss, ExampleLosses):
        return with_loss(out, loss.losses)
    alone = shape[0] == 1 and isinstance(loss, Tensor) and loss.dim() == 0
    return with_loss(out, loss.reshape(1)) if alone else out


def _expecting(state: ClipState, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """A context in which the head computes its losses with the call's labels, if it can."""
    if state.head is None or state.groups is not None:
        return nullcontext()
    ready = kwargs.get("shift_labels")
    return state.head.expecting(kwargs.get("labels") if ready is None else ready, shifted=ready is not None)


def _catching(state: ClipState, kwargs: dict[str, Any], batch: int) -> AbstractContextManager[Any]:
    """A context in which losses of the targets are computed per example, if the model's loss function does not."""
    if not state.catches_losses:
        return nullcontext()
    return PerExampleLosses(targets_of(kwargs), batch, state.deferred_checks, kwargs.get("attention_mask"))


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
    """A loss of a forward without targets is one over the batch.

    Raises:
        ClippingError: names the arguments.
    """
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        given = sorted(name for name, value in kwargs.items() if value is not None)
        raise ClippingError(
            f"the model computed a loss by itself from {', '.join(given) or 'positional arguments'}: one over the "
            "batch, which cannot be clipped by example. Pass labels by keyword. If there are none, compute losses [B] "
            "from the outputs, and call dpft.clipped_loss(model, losses)."
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


def _are_losses(losses: Any, batch: int) -> bool:
    return isinstance(losses, Tensor) and losses.dim() == 1 and len(losses) == batch


def _has_no_loss(out: Any, targets: dict[str, Any]) -> bool:
    """Whether arguments that are called like targets, but not ``labels``, were none: there is no loss."""
    return "labels" not in targets and (isinstance(out, Tensor) or loss_of(out) is None)


def _of_rows(out: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The losses ``[R]`` in the output of a forward without gradients, where the model's loss function gives them."""
    labels, losses = kwargs.get("labels"), loss_of(out)
    return losses if isinstance(labels, Tensor) and _are_losses(losses, labels.shape[:1].numel()) else None


def _example_losses(out: Any, batch: int, targets: dict[str, Any]) -> Tensor:
    """The losses ``[B]`` in ``out``.

    Raises:
        ClippingError: it is something else.
    """
    losses = loss_of(out)
    if not _are_losses(losses, batch):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ClippingError(
            f"the model computed its own loss from {', '.join(sorted(targets))} (got {got}; expected per-example "
            f"losses [{batch}], or a mean or sum of torch.nn.functional's cross_entropy, nll_loss, mse_loss, l1_loss, "
            "binary_cross_entropy(_with_logits)): a loss over the batch, or with a term that mixes examples, cannot "
            f"be clipped. {WAY_OUT}"
        )
    assert isinstance(losses, Tensor)
    return losses


def _of_examples(losses: Tensor, groups: Groups | None) -> Tensor:
    """``[B]`` losses of examples, from those of rows."""
    return losses if groups is None else groups.total(losses)


def _checking(
    state: ClipState,
    model: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    due: bool,
) -> AbstractContextManager[RowCheck | None]:
    """The check by value of a row that is run alone, where one is due."""
    if not due:
        return nullcontext()
    return RowCheck.of_row(state, model, functools.partial(_run, state, plain), args, kwargs)


def _forward_each(
    state: ClipState,
    model: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Tensor | None,
    batch: int,
    groups: Groups | None,
) -> Any:
    """One forward per row, so that no architecture can mix them; the logits are concatenated, detached.

    The loss of an example of several rows is the sum of theirs, or their mean.
    """
    losses: list[Tensor] = []
    logits: dict[Any, list[Tensor]] = {}
    out: Any = None
    largest = state.largest_batch(batch)
    checked = _pick(state, batch) if is_due(state, largest) else None
    for i in range(batch):
        row = {k: row_of(v, i, batch, k) for k, v in kwargs.items()}
        given, targets = tuple(row_of(a, i, batch) for a in args), targets_of(row)
        with (
            _checking(state, model, plain, given, row, i == checked) as check,
            _expecting(state, row),
            _catching(state, row, 1),
        ):
            out = plain(*given, **row)
        if i == 0 and _has_no_loss(out, targets):
            _hold_weights(state, weights)
            return plain(*args, **kwargs)
        loss = loss_of(out)
        if not isinstance(loss, Tensor):
            raise ClippingError(
                f"the model returned no loss for {', '.join(sorted(targets))} (got {type(loss).__name__}). Compute "
                "the losses from its outputs, and call dpft.clipped_loss(model, losses)."
            )
        losses.append(loss.reshape(()))
        if check is not None and loss.numel() == 1:
            check.compare(with_loss(out, loss.reshape(1)))
        for name, found in _logits_of(out):
            logits.setdefault(name, []).append(found.detach())  # lazy ones stay lazy
    if groups is not None:
        losses = [groups.loss_of(i, losses) for i in range(groups.examples)]
    loss = clip_boundary(state, losses, weights, "per_example")
    together = {name: joined(rows) for name, rows in logits.items() if len(rows) == batch}
    if isinstance(out, tuple):
        return (loss, *(together.values() or [None]))
    assert out is not None
    return type(out)(loss=loss, **together)


def _pick(state: ClipState, batch: int) -> int:
    """A random row. Its further forward gathers parameters where they are sharded: it is the same row on all ranks."""
    if state.engine is not None and state.engine.sharded:
        return state.engine.pick(batch)
    return random.SystemRandom().randrange(batch)


def _logits_of(out: Any) -> Iterator[tuple[Any, Tensor]]:
    """Name and value of the logits in one example's output."""
    if isinstance(out, tuple):
        yield from ((number, value) for number, value in enumerate(out[1:2]) if isinstance(value, Tensor))
        return
    items = out.items() if isinstance(out, Mapping) else getattr(out, "__dict__", {}).items()
    yield from ((name, value) for name, value in items if name.endswith("logits") and isinstance(value, Tensor))
