"""The registry of rules, looked up along the MRO, so that dynamic subclasses made by an engine find theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from dpft.errors import ClippingError
from dpft.rules.base import Host, MatrixUse, Rule
from dpft.rules.embedding import EmbeddingRule
from dpft.rules.linear import LinearRule
from dpft.rules.norm import LayerNormRule, RMSNormRule

_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.LayerNorm: LayerNormRule(),
    nn.RMSNorm: RMSNormRule(),
}
_MATCHERS: list[Callable[[nn.Module], Rule | None]] = []


def register_rule(cls: type[nn.Module], rule: Rule) -> None:
    """Register ``rule`` for ``cls`` and its subclasses that do not override its forward."""
    _RULES[cls] = rule


def register_matcher(matcher: Callable[[nn.Module], Rule | None]) -> None:
    """Add a function that returns a rule for a module that no registered class covers, or None."""
    _MATCHERS.append(matcher)


class InterceptRule:
    """Rule of a subclass that overrides forward, but makes the functional call of the class that has a rule.

    ``OPTLearnedPositionalEmbedding`` or Gemma 3's scaled embedding: their forward runs unchanged, except that the call
    of ``F.linear`` or ``F.embedding`` with the module's weight goes through the site.
    """

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def parameters(self, module: nn.Module) -> set[str]:
        covered: set[str] = self.rule.parameters(module)
        return covered

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        found: list[MatrixUse] = self.rule.uses(module, keys)
        return found

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with _Intercept(self.rule, module, host, keys) as mode:
            out = plain(*args, **kwargs)
        if mode.calls == 0:
            raise ClippingError(
                f"{type(module).__name__} ({', '.join(keys.values())}) overrides the forward of a class that "
                "has a rule, and did not make the call that the rule covers. Wrap with strategy='per_example', or "
                "freeze it."
            )
        return out


class _Intercept(TorchFunctionMode):
    def __init__(self, rule: Any, module: nn.Module, host: Host, keys: dict[str, str]) -> None:
        super().__init__()
        self.rule, self.module, self.host, self.keys, self.calls = rule, module, host, keys, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.rule.intercept(self.module, self.host, self.keys, func, args, kwargs)
        if out is None:
            return func(*args, **kwargs)
        self.calls += 1
        return out


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
        if forward_of(type(module)) is forward_of(cls) and "forward" not in module.__dict__:
            return rule
        return InterceptRule(rule) if hasattr(rule, "intercept") else None
    for matcher in _MATCHERS:
        rule = matcher(module)
        if rule is not None:
            return rule
    return None


__all__ = ["InterceptRule", "find_rule", "register_matcher", "register_rule"]
