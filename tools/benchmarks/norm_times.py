"""Norms of one layer at one length by every method: checked against float64, then timed in turns."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpft.kernels import linear_sq_norm
from tools.benchmarks.norm_tables import Layer
from tools.common.failures import reason_of
from tools.common.meter import Meter
from tools.common.spread import spread

Function = Callable[[Tensor, Tensor], Tensor]


METHODS = ("auto", "gram", "feature", "materialise")


SHORT = 0.02  # seconds: a call that is shorter is repeated until it is not


LONG = 10.0  # seconds: a call that is longer is timed once, in the pass that also counts its memory


# Relative, of a squared norm: above these it is wrong and not merely rounded. Opacus' result is a root in the inputs'
# dtype, from sums in it: two roundings of bf16 are 2^-7 of the square.
ALLOWED = {"float32": 1e-3, "bfloat16": 2.0**-6, "float16": 2.0**-9}


def einsum(x: Tensor, g: Tensor) -> Tensor:
    """Materialise ``[B, d, p]`` in float32, square, sum."""
    return torch.einsum("btd,btp->bdp", g.float(), x.float()).square().sum((1, 2))


def opacus(x: Tensor, g: Tensor) -> Tensor:
    """Opacus' norm sampler of a linear layer."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    with torch.device("meta"):
        layer = nn.Linear(x.shape[2], g.shape[2], bias=False)
    norms: Tensor = compute_linear_norm_sample(layer, [x], g)[layer.weight]
    return norms.double().square()


def functions(impls: tuple[str, ...]) -> dict[str, Function]:
    """What is compared, by name; Opacus' first."""
    found: dict[str, Function] = {"opacus": opacus, "einsum": einsum}
    for impl in impls:
        for method in METHODS:
            found[f"{impl}:{method}"] = functools.partial(linear_sq_norm, method=method, impl=impl)  # type: ignore[arg-type]  # names that come from the command line
    return found


def exact(x: Tensor, g: Tensor, block: int = 256) -> Tensor:
    """``[B]`` in float64, ``block`` rows of the gradient at a time."""
    wide = x.double()
    return torch.stack([(part.double().mT @ wide).square().sum((1, 2)) for part in g.split(block, dim=2)]).sum(0)


@dataclass
class Case:
    """A function at one size: what is written of it, and its seconds by round."""

    name: str
    call: Callable[[], Tensor]
    row: dict[str, Any]
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def going(self) -> bool:
        """It has neither failed nor been refused."""
        return "reason" not in self.row


class Bench:
    """The benchmark of one layer at one length on one device."""

    def __init__(self, layer: Layer, tokens: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, layer.dtype)
        draws = [
            torch.randn((layer.rows, tokens, width), generator=generator, device=device, dtype=dtype)
            for width in (layer.p, layer.d)
        ]
        self.layer, self.tokens, self.device = layer, tokens, device
        self.x, self.g = draws

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def first(self, case: Case, expected: Tensor) -> None:
        """The call that warms up, counts memory, and is checked."""
        self.synchronize()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with Meter([self.x, self.g]) as meter:
            found = case.call()
        self.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before if self.device == "cuda" else meter.peak
        error = float(((found.double() - expected) / expected).abs().max())
        case.row.update(error=error, peak_bytes=peak)
        if not error <= ALLOWED[self.layer.dtype]:
            case.row["reason"] = f"wrong, so not timed: off by {error:.1e}, allowed {ALLOWED[self.layer.dtype]:.0e}"
        elif seconds > LONG:
            case.seconds.append(seconds)
            case.row["once"] = True
        else:
            start = time.perf_counter()  # without what is made once: kernels compiled, threads started
            case.call()
            self.synchronize()
            case.repeats = max(1, math.ceil(SHORT / max(1e-6, time.perf_counter() - start)))

    def time(self, case: Case) -> None:
        """Seconds of one call, one more."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(case.repeats):
            case.call()
        self.synchronize()
        case.seconds.append((time.perf_counter() - start) / case.repeats)

    def run(self, chosen: dict[str, Function], rounds: int, skip: Callable[[str], str]) -> dict[str, Any]:
        """Check all, then time them in turns. ``skip(name)`` is why one is not to be run, or nothing."""
        cases = [
            Case(name, functools.partial(function, self.x, self.g), {"method": name})
            for name, function in chosen.items()
        ]
        expected = exact(self.x, self.g)
        for case in cases:
            why = skip(case.name)
            if why:
                case.row["reason"] = why
            else:
                self._try(case, functools.partial(self.first, case, expected))
        for _ in range(rounds):
            for case in cases:
                why = skip(case.name)
                if not case.going or "once" in case.row:
                    continue
                if not why:
                    self._try(case, functools.partial(self.time, case))
                elif not case.seconds:
                    case.row["reason"] = why
        baseline = next((c for c in cases if c.name == "opacus" and c.seconds and c.going), None)
        for case in cases:
            if case.going and case.seconds:
                case.row["seconds"] = spread(case.seconds)
                case.row["rounds"] = len(case.seconds)
                if baseline is not None:
                    case.row["times_opacus"] = spread(_ratios(baseline.seconds, case.seconds))
        return {"layer": asdict(self.layer), "tokens": self.tokens, "rows": [c.row for c in cases]}

    def _try(self, case: Case, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # whatever a library raises is a result of the benchmark
            case.row["reason"] = reason_of(error)
            if self.device == "cuda":
                torch.cuda.empty_cache()


def _ratios(times: list[float], others: list[float]) -> list[float]:
    """By round; where one of them was timed once, of that time."""
    count = max(len(times), len(others)) if 1 in (len(times), len(others)) else min(len(times), len(others))
    times, others = (values * count if len(values) == 1 else values for values in (times, others))
    return [a / b for a, b in zip(times, others, strict=False)]
