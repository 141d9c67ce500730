"""The registry of rules, looked up along the MRO, so that dynamic subclasses made by an engine find theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dpft.rules.base import Rule
from dpft.rules.embedding import EmbeddingRule
from dpft.rules.linear import LinearRule
from dpft.rules.norm import LayerNormRule, RMSNormRule
from dpft.rules.plain_parameters import TrackedRule, is_parameter_list, own_parameters
from dpft.rules.row_by_row import ATTENTION, RECURRENT, ROWS

_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.LayerNorm: LayerNormRule(),
    nn.RMSNorm: RMSNormRule(),
    nn.MultiheadAttention: ATTENTION,
    nn.RNN: RECURRENT,
    nn.LSTM: RECURRENT,
    nn.GRU: RECURRENT,
    nn.RNNCell: ROWS,
    nn.LSTMCell: ROWS,
    nn.GRUCell: ROWS,
    nn.Bilinear: ROWS,
    nn.EmbeddingBag: ROWS,
}
_MATCHERS: list[Callable[[nn.Module], Rule | None]] = []


def register_rule(cls: type[nn.Module], rule: Rule) -> None:
    """Register ``rule`` for ``cls`` and its subclasses that do not override its forward."""
    _RULES[cls] = rule


def register_matcher(matcher: Callable[[nn.Module], Rule | None]) -> None:
    """Add a function that returns a rule for a module that no registered class covers, or None."""
    _MATCHERS.append(matcher)


def forward_of(cls: type) -> Any:
    """The forward of a class, as a function."""
    return getattr(cls, "forward", None)


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of ``module``, or None.

    Raises:
        UnsupportedModuleError: the class has a rule that does not support an option of this module.
    """
    for cls in type(module).__mro__:
        rule = _RULES.get(cls)
        if rule is None:
            continue
        plain = forward_of(type(module)) is forward_of(cls) and "forward" not in module.__dict__
        if plain and not hasattr(module, "parametrizations"):  # with these its weight is computed of parameters
            return rule
        rule.parameters(module)  # an option that is refused whatever the forward does
        return TrackedRule()
    for matcher in _MATCHERS:
        rule = matcher(module)
        if rule is not None:
            return rule
    return TrackedRule() if own_parameters(module) and not is_parameter_list(module) else None
