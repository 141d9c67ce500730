"""What a clipped sum should be: float64, plain autograd, one example at a time, at a small size; nothing of dpft's.

Hugging Face's code casts to float32 in many places, which would make a float64 model no more exact than a float32 one:
:class:`Float64` turns every such cast into one to float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tools.benchmarks.cases import MAX_GRAD_NORM, Shape, build_model, input_ids, is_norm, losses_of
from tools.benchmarks.digest import Digest, Error, digest, error_of

TOKENS, ROWS = 64, 2
# Below these a difference is rounding, not a mistake: Opacus sums squares in float32, and adds 1e-6 to each norm.
FLOOR = Error(1e-4, 1e-2, "any parameter")


class Float64(TorchFunctionMode):
    """Inside, every request for a narrower floating dtype gives float64, and so does the default dtype."""

    def __enter__(self) -> Float64:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = {torch.float32: torch.float64, torch.bfloat16: torch.float64}
        args = [widen.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: widen.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


def small_ids(shape: Shape, device: str) -> Tensor:
    """``[min(B, 2), min(T, 64)]``, the batch on which a method is held against the oracle."""
    return input_ids(shape, device)[:ROWS, :TOKENS].contiguous()


def gradients(model: Any, shape: Shape, ids: Tensor) -> dict[str, Tensor]:
    """The gradient of the batch's mean loss, by plain autograd."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(losses_of(model, shape, ids).mean(), parameters), strict=True))


def clipped_sum(one_by_one: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``sum_i min(1, C / |g_i|) g_i`` of float64 gradients g_i.

    Raises:
        ValueError: an example is not clipped, so that a wrong norm would not show.
    """
    total: dict[str, Tensor] = {}
    for gradient in one_by_one:
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        if not norm > MAX_GRAD_NORM:
            raise ValueError(f"a gradient's norm is {float(norm):.1e}; expected more than C = {MAX_GRAD_NORM}")
        for name, g in gradient.items():
            total[name] = total.get(name, 0.0) + MAX_GRAD_NORM / norm * g
    return total


def expectations(shape: Shape, device: str) -> dict[str, Any]:
    """What methods are judged by.

    Returns:
        ``all`` and ``without_norms``, digests of the clipped sum of :func:`small_ids` over all parameters and over all
        but the weights of normalisations; ``limit``: twice the error of plain training in this dtype, or
        :data:`FLOOR` where that is more.
    """
    ids = small_ids(shape, device)
    model = build_model(replace(shape, checkpointing=False), device)
    rounded = digest(gradients(model, shape, ids))
    with Float64():
        model = model.double()
        exact = [gradients(model, shape, row[None]) for row in ids]
    kept = [{name: g for name, g in gradient.items() if not is_norm(name)} for gradient in exact]
    mean = digest({name: torch.stack([g[name] for g in exact]).mean(0) for name in exact[0]})
    return {
        "all": digest(clipped_sum(exact)),
        "without_norms": digest(clipped_sum(kept)),
        "limit": limit_of(rounded, mean),
    }


def limit_of(rounded: Digest, exact: Digest) -> Error:
    """Twice the error of plain training, at least :data:`FLOOR`."""
    plain = error_of(rounded, exact)
    return Error(max(FLOOR.whole, 2 * plain.whole), max(FLOOR.worst, 2 * plain.worst), FLOOR.where)
