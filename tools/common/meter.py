"""FLOPs and live bytes of whatever runs, counted where torch dispatches operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MIB = 2**20

_ATEN = torch.ops.aten
# Query, key and value come first; of the backward ones the output's gradient, and then they.
ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu,
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_cudnn_attention,
}
ATTENTION_BACKWARD = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
    _ATEN._scaled_dot_product_flash_attention_backward,
    _ATEN._scaled_dot_product_efficient_attention_backward,
    _ATEN._scaled_dot_product_cudnn_attention_backward,
}


def operation_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one operation by torch's formulas, with the CPU's attention, which its table lacks.

    Attention is counted with as many heads of keys and values as of queries: grouped ones are used that often, and
    the formulas of torch 2.11 refuse them. The gradient of a grouped convolution's filter is counted once: torch's
    formula takes every channel of the input with every one of the output.
    """
    packet = func.overloadpacket
    if packet in ATTENTION:
        query, key, value = (tensor.shape for tensor in args[:3])
        return int(sdpa_flop_count(query, _with_heads(key, query), _with_heads(value, query)))
    if packet in ATTENTION_BACKWARD:
        gradient, query, key, value = (tensor.shape for tensor in args[:4])
        return int(sdpa_backward_flop_count(gradient, query, _with_heads(key, query), _with_heads(value, query)))
    if packet == _ATEN.convolution_backward:
        *others, groups, (of_input, of_filter, _) = args
        formula = flop_registry[packet]
        return int(formula(*others, groups, [of_input, False, False], out_val=out)) + (
            int(formula(*others, groups, [False, of_filter, False], out_val=out)) // groups
        )
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


def _with_heads(shape: torch.Size, query: torch.Size) -> tuple[int, ...]:
    """``[B, heads, T, D]`` with the heads of the query."""
    return (shape[0], query[1], *shape[2:])


class Meter(TorchDispatchMode):
    """Counts, while it is entered, FLOPs, and bytes of live tensors by storage.

    A storage counts once, whatever views there are of it, from the operation that makes or first uses it until nothing
    holds it. Triton kernels are no operations of torch's: their FLOPs are not seen.

    Args:
        ignore: tensors not to be counted: parameters, buffers, the batch.

    Attributes:
        flops: multiply and add counted as two.
        live, peak: bytes, now and at most.
    """

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._ignored = list(ignore)  # held, so that their keys are not used again
        self._known = {t.untyped_storage()._cdata for t in self._ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += operation_flops(func, args, kwargs, out)
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                self._see(t.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
