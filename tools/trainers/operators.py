"""Bytes, FLOPs and time of a training step's operators, by class: what they do, and for whom.

A class follows from what an operator is and from where it runs: the innermost Python frame that names a place, seen
from the operator outwards. Places are in :data:`PLACES`; frames of torch's and transformers' own code name none, but
one of autograd's engine does: what it runs itself is the model's backward. The classes:

    norm            norms of per-example gradients: what is no matrix product in the code that makes them, and any
                    vector norm that a private step takes
    clip            clip factors, and gradients weighted by them: what is no matrix product in that code
    einsum          matrix products that only the private step makes: per-example gradients, Grams, weighted sums
    private other   anything else in a private library's code: copies, gradients of embeddings and norm layers
    model products  matrix products of the model's forward and backward, as often as they run: a second backward too
    model other     anything else there: attention, losses, activations
    noise           drawing it, adding it, and the division by the batch size
    optimiser       AdamW and zero_grad

dpft makes a linear layer's weight gradient in the place of autograd: it is among "einsum", and "model products" are
fewer by it than in plain training. What autograd and Opacus' hooks both make counts twice, for it is made twice.

Bytes are those of an operator's inputs and outputs, each tensor once: its elements that are distinct in memory, times
their size. A view costs nothing, nor does an allocation that writes nothing. An input counts whole, also where a
lookup reads some of its rows. Caches, Triton kernels and what numpy does (dpft's noise on a CPU) are not seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.common.meter import operation_flops

CLASSES = ("norm", "clip", "einsum", "private other", "model products", "model other", "noise", "optimiser")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "einsum", "matmul", "_scaled_mm"}
NORMS = {"norm", "linalg_vector_norm", "_foreach_norm"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}

# Module, function ("*": any other) and place. Of the modules that a frame is in, the innermost that is here counts.
# "gradient" makes per-example gradients and weighted sums, "head" both gradients of dpft's chunked head; "other" is
# private code of no purpose that has a class; the rest are as the classes.
PLACES: dict[str, dict[str, str]] = {
    "dpft": {"*": "other"},
    "dpft.kernels": {
        "*": "norm",
        "linear_grad": "gradient",
        "add_embedding_grad": "gradient",
        "weighted_embedding_grad": "gradient",
    },
    "dpft.kernels.weighted": {"*": "clip", "weighted_linear_grad": "gradient"},
    "dpft.kernels.head": {"*": "model", "_add_products": "head", "gradient_rows_at_tokens": "norm"},
    "dpft.rules": {
        "*": "model",
        "upper_sq_norm": "norm",
        "grad_sq_norm": "norm",
        "rows_at": "norm",
        "add_grad": "gradient",
        "weighted_grad": "clip",
    },
    "dpft.clipping.passes": {"*": "norm", "scale": "clip", "release": "clip"},
    "dpft.clipping.probe": {"*": "other"},
    "dpft.clipping.factors": {"*": "clip"},
    "dpft.clipping.strategies": {
        "*": "other",
        "factors": "clip",
        "run_one_pass": "clip",
        "run_two_pass": "clip",
        "run_groupwise": "clip",
    },
    "dpft.clipping.one_by_one": {"*": "other", "run_per_example": "clip"},
    "dpft.clipping.groupwise": {"*": "norm", "_end": "clip", "release": "clip"},
    "dpft.clipping.boundary": {"*": "model"},
    "dpft.models": {"*": "model"},
    "dpft.wrap": {"*": "model"},
    "dpft.noise": {"*": "noise"},
    "dpft.optimizer": {"*": "noise"},
    "opacus": {"*": "other"},
    "opacus.grad_sample": {
        "*": "gradient",
        "forward": "model",
        "compute_linear_norm_sample": "norm",
        "compute_embedding_norm_sample": "norm",
        "create_norm_sample": "norm",
        "get_norm_sample": "norm",
        "get_clipping_coef": "clip",
    },
    "opacus.utils.fast_gradient_clipping_utils": {"*": "model", "backward": "clip"},
    "opacus.optimizers": {
        "*": "other",
        "clip_and_accumulate": "clip",
        "add_noise": "noise",
        "_generate_noise": "noise",
        "scale_grad": "noise",
    },
    "torch.optim": {"*": "optimiser"},
    "torch.autograd.graph": {"_engine_run_backward": "model"},
}


@dataclass
class Count:
    """What the operators of one class sum up to.

    Attributes:
        calls: that moved bytes or multiplied.
        bytes: moved.
        flops: multiply and add counted as two.
        seconds: inside the operators; on a GPU each one waited for.
    """

    calls: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


def place_of(module: str, function: str) -> str | None:
    """The place that a frame's module and function name, or None where they say nothing."""
    name = module
    while name:
        functions = PLACES.get(name)
        if functions is not None:
            return functions.get(function, functions.get("*"))
        name = name.rpartition(".")[0]
    return None


def place_here(frame: FrameType | None) -> str:
    """The place of the innermost frame, from this one outwards, that names one; the model's where none does."""
    while frame is not None:
        found = place_of(frame.f_globals.get("__name__", ""), frame.f_code.co_name)
        if found is not None:
            return found
        frame = frame.f_back
    return "model"


def class_of(operator: str, place: str) -> str:
    """The class of an operator, by its name with the overload ("mm.out") and its place."""
    name = operator.partition(".")[0]
    product = name in PRODUCTS
    if place == "head":  # both gradients of a chunk: that of the input is written to where it belongs, by mm
        place = "gradient" if product and operator != "mm.out" else "model"
    if place == "model":
        return "model products" if product else "model other"
    if place in ("noise", "optimiser"):
        return place
    if product:
        return "einsum"
    if place == "norm" or name in NORMS:
        return "norm"
    return "clip" if place == "clip" else "private other"


def moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one call of an ATen operator reads and writes; see the module."""
    if func.overloadpacket.__name__ in ALLOCATIONS:
        return 0
    inputs, outputs = _tensors((args, kwargs)), _tensors(out)
    if not func._schema.is_mutable and outputs:
        known = {t.untyped_storage()._cdata for t in inputs}
        if all(t.untyped_storage()._cdata in known for t in outputs):
            return 0  # views, in the schema's words or not
    distinct = {(t.data_ptr(), t.dtype, tuple(t.shape), t.stride()): t for t in (*inputs, *outputs)}
    return sum(_bytes_of(t) for t in distinct.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes_of(t: Tensor) -> int:
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 0 else size
    return elements * t.element_size()


class OperatorCounter(TorchDispatchMode):
    """Counts operators by class while it is entered.

    Args:
        device: on ``"cuda"`` every operator is waited for, so that its time is its own.

    Attributes:
        counts: :class:`Count` by the names of :data:`CLASSES`, all of them.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.counts = {name: Count() for name in CLASSES}
        self._wait = torch.cuda.synchronize if device == "cuda" else _nothing_to_wait_for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._wait()
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self._wait()
        seconds = time.perf_counter() - start
        moved, flops = moved_bytes(func, args, kwargs, out), operation_flops(func, args, kwargs, out)
        name = str(func).removeprefix("aten.")
        count = self.counts[class_of(name, place_here(sys._getframe(1)))]
        count.calls += moved > 0 or flops > 0
        count.bytes += moved
        count.flops += flops
        count.seconds += seconds
        return out


def _nothing_to_wait_for() -> None:
    """On a CPU an operator has ended when it returns."""


def total(counts: Iterable[Count]) -> Count:
    """The sum of several."""
    whole = Count()
    for count in counts:
        whole.calls += count.calls
        whole.bytes += count.bytes
        whole.flops += count.flops
        whole.seconds += count.seconds
    return whole
