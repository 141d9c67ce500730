"""The rule of modules that use their own parameters as plain tensors; see :mod:`dpft.rules.tracked`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dpft.rules.base import EmbeddingUse, Host, LinearUse, MatrixUse, forward_batch_size, full_shape
from dpft.rules.parameter import shadowed, unchanged
from dpft.rules.tracked import KNOWN, leaves_of, track
from dpft.rules.tracked_functions import FUNCTIONS

KNOWN.update(FUNCTIONS)


class TrackedRule:
    """Covers every parameter of the module itself, and of parameter lists in it.

    Args:
        all_tokens: experts that are known to see all tokens, in order, and not a selection of them.
    """

    covers_children = False

    def __init__(self, all_tokens: bool = False) -> None:
        self.all_tokens = all_tokens

    def parameters(self, module: nn.Module) -> set[str]:
        return set(own_parameters(module))

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        """Of subclasses of torch's layers; other matrices are small beside theirs."""
        if "weight" not in keys or not isinstance(module, nn.Linear | nn.Embedding):
            return []
        rows, columns = full_shape(module.weight)
        if isinstance(module, nn.Embedding):
            return [EmbeddingUse(keys["weight"], rows, columns)]
        return [LinearUse(keys["weight"], rows, columns)]

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = next(leaves_of((args, kwargs)), None)
        rows = forward_batch_size(host, 1 if given is None or given.dim() == 0 else given.shape[0])
        with shadowed(module, keys, lambda p, key: track(host, unchanged(p, key), rows, direct=True)):
            return plain(*args, **kwargs)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself, and those of parameter lists and dictionaries in it, by name within it."""
    found = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, child in module.named_children():
        if is_parameter_list(child):
            found |= {f"{name}.{n}": p for n, p in child.named_parameters(recurse=False, remove_duplicate=False)}
    return found


def is_parameter_list(module: nn.Module) -> bool:
    """Whether a module only holds parameters: its parent uses them."""
    return isinstance(module, nn.ParameterList | nn.ParameterDict)
