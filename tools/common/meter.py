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

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def operation_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one operation by torch's formulas, with the CPU's attention, which its table lacks."""
    packet = func.overloadpacket
    if packet is ATTENTION:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


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
