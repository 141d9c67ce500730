"""Which rule covers which trainable parameter: the sites of a model, and what is left without one."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

from dpft.errors import UnsupportedModuleError
from dpft.rules.base import Rule
from dpft.rules.experts import ExpertsRule
from dpft.rules.plain_parameters import TrackedRule, is_parameter_list
from dpft.rules.registry import find_rule

Site = tuple[nn.Module, Rule, dict[str, str]]
"""A module, its rule, and the full canonical name of each trainable parameter that the rule covers, by name in it."""


def cover(model: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[list[Site], list[str]]:
    """The sites that cover every trainable parameter, in every module that has it; and what none covers.

    Args:
        model: not wrapped.
        parameters: the trainable parameters by canonical name.

    Returns:
        The sites, and a line for each parameter without a rule.
    """
    canonical = {id(p): name for name, p in parameters.items()}
    sites: dict[str, Site] = {}
    missing: list[str] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        if is_parameter_list(module) or any(path.startswith(whole) for whole in inside):
            continue  # the module around it uses its parameters
        rule = find_rule(module)
        if rule is None:
            continue
        names = sorted(rule.parameters(module))
        own = {name: canonical[id(p)] for name in names if id(p := module.get_parameter(name)) in canonical}
        if not own:
            continue
        known = isinstance(rule, ExpertsRule) or (isinstance(rule, TrackedRule) and rule.all_tokens)
        if not known and {"experts", "expert"} & set(path.split(".")):
            why = " (an expert sees a data-dependent selection of tokens)"
            missing += [f"{path}.{name}".lstrip(".") + f": {type(module).__name__}{why}" for name in own]
        sites[path] = module, rule, own
        if rule.covers_children:
            inside.append(f"{path}." if path else "")
    for path, module in model.named_modules():
        if any(path.startswith(whole) for whole in inside):
            continue
        read = {name: canonical[id(p)] for name, p in _read_parameters(module) if id(p) in canonical}
        own_rule = sites[path][1] if path in sites else TrackedRule()
        if read and isinstance(own_rule, TrackedRule):
            sites[path] = module, own_rule, {**(sites[path][2] if path in sites else {}), **read}
    return list(sites.values()), missing


def _read_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of modules inside that the code of ``module`` reads: ``self.conv1d.weight`` instead of a call."""
    if next(module.children(), None) is None:
        return
    classes = [cls for cls in type(module).__mro__ if cls is not nn.Module]
    functions = [f for cls in classes for name, f in vars(cls).items() if "init" not in name and "tie" not in name]
    for function in filter(inspect.isfunction, functions):
        for chain in _chains(inspect.unwrap(function).__code__):
            for start in range(len(chain) - 1):
                owner: object = module
                for name in chain[start:-1]:
                    owner = owner._modules.get(name) if isinstance(owner, nn.Module) else None
                parameter = owner._parameters.get(chain[-1]) if isinstance(owner, nn.Module) else None
                if parameter is not None:
                    yield ".".join(chain[start:]), parameter


@functools.cache  # layers of a model share their code
def _chains(code: CodeType) -> list[list[str]]:
    """The attributes that code reads of each other, ``[a, b, c]`` for ``x.a.b.c``: every beginning of each chain."""
    found: list[list[str]] = []
    chain: list[str] = []
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for instruction, after in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = []
            continue
        chain.append(str(instruction.argval))
        if after is None or after.argval not in ("dtype", "device", "shape"):
            found.append(list(chain))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found += _chains(inner)
    return found


def refuse_mixing(model: nn.Module) -> None:
    """Refuse layers that mix the examples of a batch, or keep statistics of it.

    Raises:
        UnsupportedModuleError: names the layer.
    """
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        )
        if mixes or (isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats):
            raise UnsupportedModuleError(
                f"{name!r} ({type(module).__name__}) mixes examples or keeps statistics of the batch, which are "
                "released without noise. Replace it by GroupNorm or LayerNorm."
            )


def batch_quantised(model: nn.Module) -> list[str]:
    """Layers, frozen ones too, that quantise their input with numbers of the whole batch: a line for each.

    What an example is rounded to depends on the examples beside it then, by less than the isolation check by values
    can tell from rounding. Known by name, as nothing else of theirs says it.
    """
    found = []
    for path, module in model.named_modules():
        if any(cls.__name__ == "Linear8bitLt" for cls in type(module).__mro__):
            threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
            if threshold > 0:
                found.append(
                    f"{path}: bitsandbytes' LLM.int8() keeps the columns that have an outlier in any row of the batch "
                    f"in 16 bits (llm_int8_threshold={threshold}); load the model with llm_int8_threshold=0.0"
                )
        activations = getattr(module._parameters.get("weight"), "act_quant_kwargs", None)
        if type(getattr(activations, "granularity", None)).__name__ == "PerTensor":
            found.append(f"{path}: torchao scales the activations of the batch together (PerTensor); use PerRow")
    return found
