"""The forwards of a wrapped model's modules: through their rule's site, or through the chunked head."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dpft.clipping.state import ClipState
from dpft.rules.plain_parameters import TrackedRule
from dpft.rules.tracked import Tracked, leaves_of

SITE, HEAD = "_dpft_site", "_dpft_head"
"""Where a module has its rule, its model's state and its parameters; and a head its losses in chunks."""
_TRACKED = TrackedRule()


def sites_in(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, ClipState, dict[str, str]]]:
    """The modules with sites among these and inside of them, each once, their model's state, and their parameters."""
    found = {id(m): (m, *m.__dict__[SITE][1:]) for top in modules for m in top.modules() if SITE in m.__dict__}
    return list(found.values())


def replace_forward(module: nn.Module, body: Callable[..., Any]) -> None:
    """Put ``body(module, plain, *args, **kwargs)`` in front of the module's forward.

    It is a bound method on the instance: a deep copy binds to the copy, an engine may still replace the class, and the
    signature is the original's (Trainer and generate read it).
    """
    before = module.__dict__.get("forward")
    if before is not None:
        module.__dict__["_dpft_replaced"] = before

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        replaced = self.__dict__.get("_dpft_replaced")
        plain = replaced if replaced is not None else types.MethodType(type(self).forward, self)
        return body(self, plain, *args, **kwargs)

    # Excluded from torch.compile: a traced site would be differentiated by a backward that no pass sees.
    module.__dict__["forward"] = types.MethodType(torch.compiler.disable(forward), module)


def site_forward(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    rule, state, keys = module.__dict__[SITE]
    if state.strategy == "per_example":  # decided after wrapping
        return plain(*args, **kwargs)
    with _as_registered(module, keys):
        if not rule.covers_children and any(isinstance(given, Tracked) for given in leaves_of((args, kwargs))):
            rule = _TRACKED  # its output is one of parameters alone
        return rule.forward(module, state, keys, plain, *args, **kwargs)


@contextlib.contextmanager
def _as_registered(module: nn.Module, keys: dict[str, str]) -> Iterator[None]:
    """A module that reads its own parameters, where the code of the module around it reads them as tracked ones."""
    outside: list[tuple[dict[str, Any], str, Tracked]] = []
    for name in keys:
        path, _, last = name.rpartition(".")
        attributes = (module.get_submodule(path) if path else module).__dict__
        if isinstance(attributes.get(last), Tracked):
            outside.append((attributes, last, attributes.pop(last)))
    try:
        yield
    finally:
        for attributes, last, tracked in outside:
            attributes[last] = tracked


def head_forward(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if SITE in module.__dict__:
        plain = functools.partial(site_forward, module, plain)
    if len(args) != 1 or kwargs:
        return plain(*args, **kwargs)
    head = module.__dict__[HEAD]
    with _as_registered(module, head.keys):
        return head.forward(module, plain, args[0])
