"""Checks the autograd graph before it is clipped: every trainable parameter must be used through its rule's site."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from dpft.errors import UnsupportedModuleError
from dpft.rules.tracked import Tracked, unseen_use

# Which inputs of a site node are its parameters; a parameter as another input is data, and its gradient dX.
_SITES: dict[str, Sequence[int]] = {
    "LinearSiteBackward": (1, 2),
    "HeadLossSiteBackward": (1, 2),
    "EmbeddingSiteBackward": (1,),
    "LayerNormSiteBackward": (1, 2),
    "ParameterSiteBackward": range(2, 1000),
    "GradSampleSiteBackward": range(2, 1000),
    "ExpertsSiteBackward": (1, 2),
    "TiledBlockBackward": range(2, 1000),
}


def walk(root: Any) -> Iterator[tuple[Any, int, Any]]:
    """Every edge ``(node, input's number, child)`` of the autograd graph below ``root``, each node once."""
    seen: set[Any] = {root}
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        for slot, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            yield node, slot, child
            if child not in seen:
                seen.add(child)
                stack.append(child)


def is_reentrant(node: Any) -> bool:
    """Whether a node is a reentrant checkpoint: its graph is not visible, and it does not support ``inputs=``."""
    name: str = node.name()
    return name.endswith("CheckpointFunctionBackward")


def may_accumulate(loss: Tensor) -> bool:
    """Whether a node in the graph of ``loss`` may run a backward of its own, which accumulates into ``.grad``.

    A reentrant checkpoint does, and any custom function of other code may (Reformer's reversible layers).
    """
    return loss.grad_fn is not None and any(_is_of_others(node) for node, _, _ in walk(loss.grad_fn))


def _is_of_others(node: Any) -> bool:
    written_in_python = getattr(type(node), "_forward_cls", None)
    return written_in_python is not None and not written_in_python.__module__.startswith("dpft.")


def check_coverage(losses: Tensor, names: dict[int, str] | None) -> bool:
    """Walk the autograd graph of ``losses`` and check how it uses every trainable parameter.

    Args:
        losses: ``[B]`` per-example losses.
        names: ``id`` of each covered parameter -> its full name; None if an engine replaces parameters by others.

    Returns:
        Whether the graph contains a reentrant checkpoint.

    Raises:
        UnsupportedModuleError: a parameter is used by an operation other than its rule's (a functional call that
            bypasses its module), or is not one of the model's.
    """
    if isinstance(losses, Tracked):
        # No activation that needs a gradient met a function whose examples are known.
        raise UnsupportedModuleError(
            f"the losses are computed of {', '.join(sorted(losses.made.names)[:5])} by functions of which dpft does "
            "not know which example a row belongs to. Wrap with strategy='per_example', write a rule for the module "
            "(dpft.register_rule), or freeze it."
        )
    root = losses.grad_fn
    if root is None:
        raise UnsupportedModuleError(
            "the per-example losses do not depend on any trainable parameter: they have no grad_fn. Was the forward "
            "run under torch.no_grad(), or is every parameter frozen?"
        )
    reentrant = False
    for node, slot, child in walk(root):
        reentrant = reentrant or is_reentrant(node)
        if child.name() == "UnseenUseBackward":
            raise unseen_use(child.names)
        variable = getattr(child, "variable", None)
        if isinstance(variable, nn.Parameter):
            _check_leaf(variable, node.name(), slot, names)
    return reentrant


def count_uses(losses: Tensor, names: dict[int, str]) -> Counter[str]:
    """How many sites in the graph of ``losses`` will report a gradient of each parameter; ``names`` by ``id``."""
    uses: Counter[str] = Counter()
    assert losses.grad_fn is not None
    for node, slot, child in walk(losses.grad_fn):
        name = names.get(id(getattr(child, "variable", None)))
        if name is not None and slot in _SITES.get(node.name(), ()):
            uses[name] += 1
    return uses


def foreign_leaves(names: dict[int, str]) -> dict[int, tuple[Tensor, Tensor | None, int]]:
    """Trainable parameters of this process that are not in ``names``, with their ``.grad``.

    A backward through a reentrant checkpoint accumulates into every leaf that it reaches, and hides which these are.
    """
    found: dict[int, tuple[Tensor, Tensor | None, int]] = {}
    for value in gc.get_objects():
        if issubclass(type(value), Tensor) and isinstance(value, nn.Parameter) and value.requires_grad:
            if id(value) in names:
                continue
            grad = value.grad
            found[id(value)] = (value, grad, -1 if grad is None else grad._version)
    return found


def refuse_strays(before: dict[int, tuple[Tensor, Tensor | None, int]]) -> None:
    """Raise if one of the tensors of :func:`foreign_leaves` was given a gradient since.

    Raises:
        UnsupportedModuleError: it is trained on an unclipped gradient.
    """
    for tensor, grad, version in before.values():
        if tensor.grad is not None and (tensor.grad is not grad or tensor.grad._version != version):
            raise UnsupportedModuleError(
                f"a parameter of shape {list(tensor.shape)} that is not one of the wrapped model's received an "
                "unclipped gradient inside a reentrant checkpoint. Put it into the model before dpft.wrap, or use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )


def _check_leaf(parameter: nn.Parameter, parent: str, slot: int, names: dict[int, str] | None) -> None:
    known = f"of shape {list(parameter.shape)}" if names is None else names.get(id(parameter))
    if known is None:
        raise UnsupportedModuleError(
            f"the losses depend on a trainable parameter of shape {list(parameter.shape)} (through {parent}) "
            "that is not one of the wrapped model's: it would be trained on an unclipped gradient. Register it in "
            "the model before dpft.wrap, or set requires_grad_(False)."
        )
    if slot not in _SITES.get(parent, ()):
        raise UnsupportedModuleError(
            f"parameter {known!r} is used by {parent} directly, not through its module's forward, so its "
            "gradient is not seen per example. Wrap with strategy='per_example', or freeze it."
        )
