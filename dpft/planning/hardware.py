"""Speed of devices: data-sheet figures of some, a measurement of the present one, and a roofline model of step time.

The roofline model (Williams et al. 2009): an operation takes the larger of its FLOPs over the device's rate and
its bytes over the bandwidth, plus a constant overhead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpft.clipping.strategy_choice import free_memory
from dpft.planning.step_meter import Operation

__all__ = ["HARDWARE", "Hardware", "measure"]

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """Speed and memory of a device. All rates are those that real kernels achieve.

    Attributes:
        name: of the device.
        memory: bytes.
        rates: FLOP/s of matrix products by dtype; float32's is used for a dtype not listed.
        attention: fraction of the rate of matrix products that the fused attention kernel achieves.
        bandwidth: bytes/s, reads plus writes.
        overhead: seconds that the host needs to launch one operation.
        asynchronous: whether the device runs while the host launches further operations.
        source: of the figures.
        link: bytes/s between page-locked host memory and the device, in one direction.
        host_draw: seconds of a Gaussian value on the host, one thread.
    """

    name: str
    memory: int
    rates: Mapping[torch.dtype, float]
    attention: float
    bandwidth: float
    overhead: float
    asynchronous: bool
    source: str
    link: float = 25e9
    host_draw: float = 10e-9

    def seconds(self, operations: Mapping[Operation, int]) -> float:
        """Predicted seconds of a step that runs each of ``operations`` the given number of times."""
        work = sum(self._device_seconds(op) * count for op, count in operations.items())
        host = self.overhead * sum(operations.values())
        return max(work, host) if self.asynchronous else work + host

    def _device_seconds(self, op: Operation) -> float:
        rate = self.rates.get(op.dtype, self.rates[torch.float32])
        flops = op.flops / 2 if op.causal else op.flops
        if op.attention:
            rate *= self.attention
        return max(flops / rate, op.moved / self.bandwidth)


def _published(
    name: str, memory: float, bandwidth: float, attention: float, link: float, source: str, **tera: float
) -> Hardware:
    """From a data sheet: rates (TFLOP/s, dense) times 0.7, bandwidth and link (GB/s) times 0.8."""
    dtypes = {"bf16": (torch.bfloat16, torch.float16), "fp32": (torch.float32,), "fp64": (torch.float64,)}
    rates = {dtype: 0.7 * tera[key] * _TERA for key, both in dtypes.items() for dtype in both}
    achieved = 0.8 * bandwidth * _GIGA, 8e-6, True, source, 0.8 * link * _GIGA
    return Hardware(name, int(memory * _GIGA), rates, attention / 0.7, *achieved)


# Attention: the fraction of the data sheet's bf16 rate that FlashAttention-2 achieves: 35 % on an H100 (Shah et al.
# 2024, arXiv 2407.08608), 50 to 73 % on an A100 (Dao 2023, arXiv 2307.08691). The factors 0.7 and 0.8 above and 8 us
# per operation are our assumptions, not measured: they hardly affect the ratio of two steps of one model. Links: PCIe
# 4.0 and 5.0 with 16 lanes.
HARDWARE: dict[str, Hardware] = {
    "a100": _published("a100", 80, 2039, 0.6, 32, "NVIDIA A100 data sheet, 80 GB SXM", bf16=312, fp32=19.5, fp64=19.5),
    "h100": _published("h100", 80, 3350, 0.35, 64, "NVIDIA H100 data sheet, SXM", bf16=989.5, fp32=67, fp64=67),
    "h200": _published("h200", 141, 4800, 0.35, 64, "NVIDIA H200 data sheet, SXM", bf16=989.5, fp32=67, fp64=67),
}


def measure(device: torch.device) -> Hardware:
    """Measures ``device``, once per number of threads, in less than half a second on an idle machine."""
    return _measure(device, torch.get_num_threads())


@functools.cache
def _measure(device: torch.device, threads: int) -> Hardware:
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    edge = 4096 if gpu else 384
    rates = {dtype: _matmul_rate(edge, dtype, device) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    rates[torch.float16] = rates[torch.bfloat16]
    main = torch.bfloat16 if gpu else torch.float32
    block = torch.zeros(2**26 if gpu else 2**21, device=device)
    one = torch.zeros(1, device=device)
    repeats, count = 200, 1 << 18
    generator = np.random.Generator(np.random.Philox(0))

    def small() -> None:
        for _ in range(repeats):
            one.add_(1)

    return Hardware(
        name=name,
        memory=free_memory(device),
        rates=rates,
        attention=_attention_rate(device, main) / rates[main],
        # allocates its result every time, as in a step
        bandwidth=8 * block.numel() / _best_of(lambda: block + 1, device),
        overhead=_best_of(small, device) / repeats,
        asynchronous=gpu,
        source="measured here",
        link=_link_rate(device) if gpu else 8 * block.numel() / _best_of(lambda: block + 1, device),
        host_draw=_best_of(lambda: generator.standard_normal(count, np.float32), torch.device("cpu")) / count,
    )


def _best_of(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Seconds of the fastest of ``times`` calls, after one warm-up call."""
    best = float("inf")
    for i in range(times + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def _matmul_rate(edge: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(edge, edge, dtype=dtype, device=device)
    return 2 * edge**3 / _best_of(lambda: a @ a, device)


def _link_rate(device: torch.device) -> float:
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return host.numel() / _best_of(lambda: host.copy_(there, non_blocking=True), device)


def _attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    heads, tokens, width = (16, 4096, 128) if device.type == "cuda" else (2, 512, 64)
    q: Tensor = torch.ones(1, heads, tokens, width, dtype=dtype, device=device)
    with torch.no_grad():
        took = _best_of(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)
    return 2 * heads * tokens * tokens * width / took  # two products, half of each (causal)
