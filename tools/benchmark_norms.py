"""Squared gradient norms of one linear layer: ours by each method, Opacus' function, a plain einsum; beside float64.

    python tools/benchmark_norms.py --preset cpu --json norms_cpu.json
    python tools/benchmark_norms.py --layers 1024x1024 2048x128256 --tokens 512 4096 --dtype bfloat16

x [B, T, p] and g [B, T, d] are normal draws of a fixed seed. Time is the median of rounds in which every method has
its turn; the ratio is Opacus' time to the method's, of the same round. Memory is bytes of live tensors (on a GPU: of
its allocator) above x and g. A method that is off by more than rounding is refused a time.

The last table is what the Opacus fork that this work starts from says of its own kernel, beside this machine's ratio.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from dpft.kernels import linear_sq_norm
from tools.benchmarks.norms_report import Layer, plot_norms, seeds_table, table
from tools.common.conditions import conditions, describe_device
from tools.common.failures import reason_of
from tools.common.json_files import json_path, write_json
from tools.common.meter import Meter

Function = Callable[[Tensor, Tensor], Tensor]
METHODS = ("auto", "gram", "feature", "materialise")
SHORT = 0.02  # seconds: a call that is shorter is repeated until it is not
LONG = 10.0  # seconds: a call that is longer is timed once, in the pass that also counts its memory
# Relative, of a squared norm: above these it is wrong and not merely rounded. Opacus' result is a root in the inputs'
# dtype, from sums in it: two roundings of bf16 are 2^-7 of the square.
ALLOWED = {"float32": 1e-3, "bfloat16": 2.0**-6, "float16": 2.0**-9}


@dataclass(frozen=True)
class Preset:
    """Layers with their lengths, in this order, and the seconds after which nothing more is started."""

    device: str
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]
    seconds: float
    rounds: int
    impls: tuple[str, ...]


ALL = tuple(512 << k for k in range(7))
PRESETS = {
    "cpu": Preset(
        "cpu",
        (
            (Layer(1024, 1024), (512, 1024, 2048, 4096)),
            (Layer(512, 32_000), (512,)),
            (Layer(1024, 1024), (16_384,)),
            (Layer(256, 1024), (512, 4096)),
            (Layer(512, 512, 1, "bfloat16"), (512, 2048)),
            (Layer(1024, 1024, 4), (512, 2048)),
            (Layer(512, 32_000), (2048,)),
        ),
        seconds=170.0,
        rounds=5,
        impls=("torch",),
    ),
    "gpu": Preset(
        "cuda",
        (
            (Layer(1024, 1024), ALL),
            (Layer(2048, 2048, 1, "bfloat16"), ALL),
            (Layer(4096, 4096, 1, "bfloat16"), ALL),
            (Layer(2048, 128_256, 1, "bfloat16"), ALL),
            (Layer(2048, 5632, 4, "bfloat16"), (2048, 8192)),
            (Layer(4096, 4096), (4096, 16_384)),
        ),
        seconds=110.0,
        rounds=5,
        impls=("torch", "triton"),
    ),
    "smoke": Preset("cpu", ((Layer(48, 32), (64, 96)), (Layer(24, 200, 2), (64,))), 30.0, 2, ("torch",)),
}


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
                case.row["seconds"] = _spread(case.seconds)
                case.row["rounds"] = len(case.seconds)
                if baseline is not None:
                    case.row["times_opacus"] = _spread(_ratios(baseline.seconds, case.seconds))
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


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Skipper:
    """Says of a method whether it would outlast the budget, by its time at the length before: at most quadratic."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._last: dict[tuple[Layer, str], tuple[int, float]] = {}

    @property
    def left(self) -> float:
        """Seconds; negative when it is spent."""
        return self._end - time.monotonic()

    def learn(self, layer: Layer, result: dict[str, Any]) -> None:
        """Remember the times of a length."""
        for row in result["rows"]:
            if "seconds" in row:
                self._last[layer, row["method"]] = result["tokens"], row["seconds"]["median"]

    def __call__(self, layer: Layer, tokens: int, name: str) -> str:
        before, seconds = self._last.get((layer, name), (tokens, 0.0))
        expected = seconds * (tokens / before) ** 2
        if self.left > expected:
            return ""
        if self.left <= 0:
            return f"not run: the time budget of {self.seconds:.0f} s is spent"
        return f"not run: it would take some {expected:.0f} s, and {self.left:.0f} s of the time budget are left"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="instead of the layers below")
    parser.add_argument("--layers", nargs="+", metavar="PxD", help="d_in x d_out: 1024x1024 2048x128256")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rows", type=int, default=None, help="B")
    parser.add_argument("--dtype", choices=tuple(ALLOWED))
    parser.add_argument("--impls", nargs="+", choices=("torch", "triton", "auto"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="time budget; what does not fit into it is skipped, and says so")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args()
    if args.preset and any(getattr(args, name) is not None for name in ("layers", "tokens", "rows", "dtype")):
        parser.error("--preset brings its own --layers, --tokens, --rows and --dtype; leave them out, or the preset")
    numbers = [args.rows, args.rounds, args.seconds, args.threads, *(args.tokens or [])]
    if any(n is not None and n <= 0 for n in numbers):
        parser.error(f"--rows, --rounds, --seconds, --threads and --tokens are above 0; got {numbers}")
    return args


def by_hand(args: argparse.Namespace) -> Preset:
    """The layers that the options name.

    Raises:
        ValueError: a layer that is not written PxD.
    """
    layers = []
    for text in args.layers or ["1024x1024"]:
        p, _, d = text.partition("x")
        if not (p.isdigit() and d.isdigit() and int(p) and int(d)):
            raise ValueError(f"--layers has {text!r}; expected d_in and d_out with an x between them, as 1024x4096")
        layers.append((Layer(int(p), int(d), args.rows or 1, args.dtype or "float32"), tuple(args.tokens or [1024])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Preset(device, tuple(layers), 3600.0, 5, ("torch", "triton") if device == "cuda" else ("torch",))


def sizes(preset: Preset) -> Iterator[tuple[Layer, int]]:
    """Every layer with each of its lengths, the shortest first."""
    for layer, lengths in preset.layers:
        yield from ((layer, tokens) for tokens in sorted(lengths))


def main(args: argparse.Namespace) -> int:
    try:
        preset = PRESETS[args.preset] if args.preset else by_hand(args)
    except ValueError as error:
        print(f"benchmark_norms: {error}", file=sys.stderr)
        return 2
    device = args.device or preset.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmark_norms: it is to run on a GPU, and torch finds none. --device cpu?", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    chosen, skipper = functions(tuple(args.impls or preset.impls)), Skipper(args.seconds or preset.seconds)
    results: list[dict[str, Any]] = []
    report = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "conditions": {**conditions(args.threads), **describe_device(device)},
        "results": results,
    }
    try:
        for layer, tokens in sizes(preset):
            try:
                bench = Bench(layer, tokens, device)
                skip = functools.partial(skipper, layer, tokens)
                result = bench.run(chosen, args.rounds or preset.rounds, skip)
            except RuntimeError as error:  # not even the inputs, or the float64 product, fit
                result = {"layer": asdict(layer), "tokens": tokens, "rows": [], "reason": reason_of(error)}
            skipper.learn(layer, result)
            results.append(result)
            print(table(result), flush=True)
            if args.json:
                write_json(args.json, {**report, "seconds_taken": skipper.seconds - skipper.left})
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was finished is in {args.json}" if args.json else "\ninterrupted", file=sys.stderr)
        return 130
    print(seeds_table(results))
    if args.json:
        plot_norms(args.json.with_suffix(".png"), report)
    print(f"\n{skipper.seconds - skipper.left:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
