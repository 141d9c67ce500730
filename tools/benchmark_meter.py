"""What the benchmarks count and compare with: bytes and FLOPs of a step, digests of gradients, reasons of failures.

A digest is small, so that gradients of different processes are compared without being sent: per parameter a count
sketch (Charikar et al. 2002), that is sums of the entries with random signs in :data:`BUCKETS` buckets. It is linear,
and the squared norm of the sketch of an error is an unbiased estimate of the error's; where the error is spread over
many entries, with a relative standard deviation of sqrt(2 / BUCKETS) = 9 %.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

BUCKETS = 256
CHUNK = BUCKETS << 14
SEED = 20_240_229
Digest = dict[str, list[float]]

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


def digest(gradients: dict[str, Tensor]) -> Digest:
    """The count sketch of each gradient: 256 float64 sums, or its entries where it has no more than that."""
    return {name: _sketch(gradient.detach().flatten()) for name, gradient in gradients.items()}


def _sketch(values: Tensor) -> list[float]:
    if values.numel() <= BUCKETS:
        return [float(v) for v in values.tolist()]
    generator = torch.Generator(values.device).manual_seed(SEED)
    total = torch.zeros(BUCKETS, dtype=torch.float64, device=values.device)
    for part in values.split(CHUNK):
        signs = torch.randint(0, 2, part.shape, dtype=torch.int8, device=part.device, generator=generator)
        signed = part.double() * (2 * signs - 1)
        whole = len(signed) // BUCKETS * BUCKETS
        total += signed[:whole].view(-1, BUCKETS).sum(0)
        total[: len(signed) - whole] += signed[whole:]
    return [float(v) for v in total.tolist()]


@dataclass(frozen=True)
class Error:
    """How far a clipped sum is from what it should be, in L2 norm, relative.

    Attributes:
        whole: of the gradient of all parameters.
        worst: of the one parameter where it is largest; a small parameter that is wrong does not show in the whole.
        where: that parameter.
    """

    whole: float
    worst: float
    where: str

    def within(self, limit: Error) -> bool:
        """Whether it is at most the limit, in the whole and in every parameter; NaN is not."""
        return self.whole <= limit.whole and self.worst <= limit.worst

    def __str__(self) -> str:
        return f"{self.whole:.1e} of the whole, {self.worst:.1e} of {self.where}"


def error_of(found: Digest, expected: Digest) -> Error:
    """The error of one digest against another; infinite where a parameter is missing or not finite."""
    if found.keys() != expected.keys():
        return Error(math.inf, math.inf, ", ".join(sorted(found.keys() ^ expected.keys())[:3]))
    total = norm = 0.0
    worst, where = 0.0, "no parameter"
    for name, values in expected.items():
        off = sum((a - b) ** 2 for a, b in zip(found[name], values, strict=True))
        size = sum(b * b for b in values)
        if not math.isfinite(off):
            return Error(math.inf, math.inf, name)
        relative = math.sqrt(off / size) if size else (0.0 if off == 0 else math.inf)
        if relative > worst:
            worst, where = relative, name
        total, norm = total + off, norm + size
    return Error(math.sqrt(total / norm) if norm else math.inf, worst, where)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CPU torch says so in the text of a RuntimeError only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """One line: out of memory, or the error's class and first line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return f"out of memory ({text})" if out_of_memory(error) else text


def describe_device(device: str) -> dict[str, Any]:
    """The name and memory of the GPU."""
    if device != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
