"""Rule for the experts of transformers' mixtures of experts: one parameter ``[E, ...]`` for all experts.

transformers decorates such a module with ``use_experts_implementation`` and runs it by the implementation that the
config names, ``eager``, ``batched_mm`` or ``grouped_mm``; all compute the same function. Where one of its parameters
is trained, dpft runs a forward of its own instead, whatever the config names: the (token, slot) pairs are sorted by
expert, each expert's linear maps are two products, and no token is dropped. Frozen, it is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.errors import ClippingError, UnsupportedModuleError
from dpft.kernels.checksums import signs
from dpft.kernels.experts import (
    Routing,
    add_bias_,
    add_experts_grad,
    bias_grads,
    experts_grad_sq_norm,
    experts_upper_sq_norm,
    grouped_product,
    regroup,
    route,
    weighted_experts_grad,
)
from dpft.kernels.gram import InputCache
from dpft.kernels.impl import Impl
from dpft.kernels.linear import Method
from dpft.kernels.weighted import RowWeights
from dpft.rules.base import (
    Host,
    MatrixUse,
    SiteFunction,
    attribute,
    forward_batch_size,
    full_shape,
    is_whole_batch,
    rows_of_pass,
    running_pass,
)
from dpft.rules.groups import Groups

_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", None)
# What configs call the experts of a token.
_SLOTS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertsUse:
    """``y_n = W_e x_n`` of the expert e of each pair (``weight [E, d, p]``, or ``[E, p, d]`` where ``transposed``).

    Here ``x [N, p]`` and ``g [N, d]`` are of the pairs of all examples, sorted as ``routing`` says.

    Attributes:
        key: full canonical name of the weight.
        experts: E.
        out_features: d.
        in_features: p.
        slots: k, the experts of a token.
        transposed: see above.
        impl: that of :func:`dpft.kernels.linear_sq_norm`.
        routing: of this use's forward; None in a use that only stands for its size.
        groups: the rows of each example, where one has several.
    """

    key: str
    experts: int
    out_features: int
    in_features: int
    slots: int
    transposed: bool = False
    impl: Impl = "auto"
    routing: Routing | None = None
    groups: Groups | None = None

    @property
    def _routing(self) -> Routing:
        assert self.routing is not None
        return self.routing

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        return experts_upper_sq_norm(self._routing, x, g, method, self.impl)

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return experts_grad_sq_norm(self._routing, *self._operands(x, g), self.impl)

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        return add_experts_grad(self._routing, *self._operands(x, g), out)

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        grad = weighted_experts_grad(self._routing, *self._operands(x, g), weights, dtype)
        return grad if out is None else out.add_(grad)

    def _operands(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (g, x) if self.transposed else (x, g)

    def _by_example(self, t: Tensor) -> Tensor:
        rows = self._routing.by_row(t)
        return rows if self.groups is None else self.groups.join(rows)

    def watched(self, g: Tensor) -> Tensor:
        return self._by_example(g)

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        wide = torch.promote_types(g.dtype, torch.float32)
        rows = self._by_example((x @ signs(x.shape[1], x)).double())
        of_pairs = (
            g.sum(1, dtype=wide),
            torch.linalg.vector_norm(g, 1, dim=1, dtype=wide),
            torch.linalg.vector_norm(x, dim=1, dtype=wide),
        )
        sums, sizes, inputs = (self._by_example(t.double()).sum(1) for t in of_pairs)
        return torch.stack([sums, sizes, (rows * signs(rows.shape[1], rows)).sum(1), inputs])

    def grad_numel(self) -> int:
        return self.experts * self.out_features * self.in_features

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        return None


class ExpertsSite(SiteFunction):
    """The node of ``y = x W_e^T + b_e``, ``x [N, p]`` sorted by expert; saves ``x``, ``W`` and ``b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, tap: Tensor, site: Any) -> Tensor:
        ctx.save_for_backward(x, w, b)
        ctx.site = site
        use: ExpertsUse = site.use
        with torch.autocast(x.device.type, enabled=False):  # x has the dtype of the products
            y = grouped_product(x, w if use.transposed else w.mT, use._routing)
            return y if b is None else add_bias_(y, b, use._routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        site = ctx.site
        use: ExpertsUse = site.use
        routing = use._routing
        running = running_pass(site.host, use.key)
        if routing.rows != rows_of_pass(running):
            raise ClippingError(
                f"{use.key!r} was run on {routing.rows} rows and is now in a backward of {rows_of_pass(running)}: it "
                "is not known which example a token belongs to. Run it in the wrapped model's forward, wrap with "
                "strategy='per_example', or freeze it."
            )
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            with site.host.hold(w):
                dx = grouped_product(g, w.mT if use.transposed else w, routing)
        groups = running.groups
        if groups is not None:
            routing, moved = regroup(routing, groups.owners().to(g.device), groups.examples)
            use, x, g = replace(use, routing=routing, groups=groups), x[moved], g[moved]
        if site.weight:
            dw = running.matrix(use, x, g, w)
        if b is not None and site.bias_key is not None:
            db = running.vector(site.bias_key, bias_grads(g, routing), b)
        return dx, dw, db, None, None


class _Site:
    """The non-tensor arguments of one node."""

    __slots__ = ("bias_key", "host", "use", "weight")

    def __init__(self, host: Host, use: ExpertsUse, weight: bool, bias_key: str | None) -> None:
        self.host, self.use, self.weight, self.bias_key = host, use, weight, bias_key


class ExpertsRule:
    """Rule of a module that ``use_experts_implementation`` made: ``gate_up_proj`` or ``up_proj``, and ``down_proj``.

    ``[E, d, p]``, or ``[E, p, d]`` where it ``is_transposed``, with biases ``[E, d]`` where it ``has_bias``. Its
    forward gets the tokens of all rows of the batch, in order: a selection of them is refused.
    """

    covers_children = False

    def parameters(self, module: nn.Module) -> set[str]:
        name = type(module).__name__
        if attribute(module, "_is_expert_parallel"):
            raise UnsupportedModuleError(
                f"{name} has its experts on several ranks (expert parallelism), over which the norm of one example "
                "would be spread. Load the model without it."
            )
        _refuse_implementation(module)
        names = _weights(module)
        covered = set(names) | ({f"{weight}_bias" for weight in names} if attribute(module, "has_bias") else set())
        for weight in sorted(covered):
            shape, dims = full_shape(attribute(module, weight)), 2 if weight.endswith("_bias") else 3
            if len(shape) != dims or shape[0] != attribute(module, "num_experts"):
                raise UnsupportedModuleError(
                    f"{name} has {weight} of shape {list(shape)}; expected {dims} dimensions, of which the first are "
                    f"its {attribute(module, 'num_experts')} experts. Wrap with strategy='per_example', or freeze it."
                )
        return covered

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        config = attribute(module, "config")
        slots = next((getattr(config, name) for name in _SLOTS if getattr(config, name, None)), 1)
        return [_use(module, name, keys, int(slots)) for name in _weights(module) if name in keys]

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """``hidden_states [B * T, D]``, ``top_k_index`` and ``top_k_weights [B * T, k]`` to ``[B * T, D]``."""
        hidden, index, weights = (*args, *kwargs.values())
        _refuse_implementation(module)
        site_name = next(iter(keys.values()))
        if hidden.dim() != 2 or index.shape != weights.shape or index.shape[:1] != hidden.shape[:1]:
            raise ClippingError(
                f"{site_name!r} got hidden states {list(hidden.shape)}, indices {list(index.shape)} and weights "
                f"{list(weights.shape)}; expected [B * T, D], [B * T, k] and [B * T, k]. Wrap with "
                "strategy='per_example', or freeze it."
            )
        tokens, slots = index.shape
        rows = forward_batch_size(host, tokens)
        if not is_whole_batch(host, tokens):
            raise ClippingError(
                f"{site_name!r} got {tokens} tokens in a batch of {rows} rows, which are not all tokens of the "
                "model's input: it is not known which example a token belongs to. Wrap with strategy='per_example', "
                "or freeze it."
            )
        routing = route(index, attribute(module, "num_experts"), rows)
        x = hidden[routing.order // max(1, slots)]
        up, down = _weights(module)
        y = _apply(module, host, keys, routing, up, x)
        y = attribute(module, "_apply_gate" if attribute(module, "has_gate") else "act_fn")(y)
        y = _apply(module, host, keys, routing, down, y)
        if attribute(module, "has_post_expert_norm"):
            y = attribute(module, "post_expert_norm")(y)
        y = y * weights.reshape(-1)[routing.order].unsqueeze(-1)
        return y[routing.inverse].view(tokens, slots, y.shape[1]).sum(1).to(hidden.dtype)


def _refuse_implementation(module: nn.Module) -> None:
    """Raise for an implementation that may compute something else (in 8 bits, or registered by the user)."""
    found = attribute(attribute(module, "config"), "_experts_implementation")
    if found not in _IMPLEMENTATIONS:
        raise UnsupportedModuleError(
            f"{type(module).__name__} runs by experts_implementation={found!r}, of which dpft does not know that it "
            "computes what 'eager' does. Use model.set_experts_implementation('grouped_mm'), wrap with "
            "strategy='per_example', or freeze it."
        )


def _weights(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if attribute(module, "has_gate") else "up_proj"), "down_proj"


def _use(module: nn.Module, name: str, keys: dict[str, str], slots: int) -> ExpertsUse:
    experts, d, p = full_shape(attribute(module, name))
    transposed = bool(attribute(module, "is_transposed"))
    if transposed:
        d, p = p, d
    return ExpertsUse(keys.get(name, keys.get(f"{name}_bias", name)), experts, d, p, slots, transposed)


def _apply(module: nn.Module, host: Host, keys: dict[str, str], routing: Routing, name: str, x: Tensor) -> Tensor:
    """One of the two linear maps, through a site node; in the dtype in which transformers computes it."""
    w, bias = attribute(module, name), f"{name}_bias"
    b = attribute(module, bias) if attribute(module, "has_bias") else None
    use = replace(_use(module, name, keys, 1), impl=host.impl, routing=routing)
    if name in keys:
        host.record_use(use.key)
    grouped = attribute(attribute(module, "config"), "_experts_implementation") == "grouped_mm"
    if torch.is_autocast_enabled(x.device.type) and not grouped:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    else:
        x = x.to(w.dtype)  # autocast does not know grouped_mm: transformers computes in the weights' dtype
    y: Tensor = ExpertsSite.apply(x, w, b, host.tap, _Site(host, use, name in keys, keys.get(bias)))
    return y


def runs_eagerly(module: nn.Module) -> bool:
    """Whether transformers loops over the experts that got tokens."""
    return attribute(attribute(module, "config"), "_experts_implementation") in ("eager", None)


def match_experts(module: nn.Module) -> ExpertsRule | None:
    """The rule of a module of transformers whose forward is the one that ``use_experts_implementation`` made."""
    forward = getattr(getattr(type(module), "forward", None), "__code__", None)
    made = forward is not None and "experts_interface" in forward.co_freevars
    known = any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
    ready = all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts", "config"))
    return ExpertsRule() if made and known and ready and "forward" not in module.__dict__ else None
