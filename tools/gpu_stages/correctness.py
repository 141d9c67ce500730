"""Whether it is right on this device: norms by every method, and a step of every strategy, against float64."""

from __future__ import annotations

from dataclasses import replace

from tools.benchmarks import oracle
from tools.benchmarks.cases import Shape
from tools.benchmarks.digest import error_of
from tools.benchmarks.norm_tables import Layer
from tools.benchmarks.norm_times import ALLOWED, METHODS, Bench, exact, functions
from tools.benchmarks.worker import Case
from tools.common.failures import reason_of
from tools.gpu_stages.context import WRONG, Context

DTYPES = ("float32", "bfloat16", "float16")
# An odd size beside a round one: tiles that end beyond the matrix are where kernels go wrong.
LAYERS = (Layer(256, 384, 2), Layer(130, 67, 3))
TOKENS = (512, 97)
SHAPES = (
    Shape("llama", 128, 2, 500, 96, 2),
    Shape("gpt2", 128, 2, 500, 96, 2),
    Shape("llama", 128, 2, 500, 96, 2, dtype="bfloat16", checkpointing=True),
)
STRATEGIES = ("one_pass", "two_pass", "per_example", "one_pass_triton", "two_pass_triton")


def run(context: Context) -> str | None:
    """Returns WRONG where anything is off by more than rounding."""
    wrong = kernels(context) + steps(context)
    return WRONG if wrong else None


def kernels(context: Context) -> int:
    """Rows for each layer, dtype, implementation and method; returns how many were wrong."""
    wrong = 0
    for layer, tokens in zip(LAYERS[1:] if context.rehearse else LAYERS, TOKENS[::-1], strict=False):
        for dtype in DTYPES:
            bench = Bench(replace(layer, dtype=dtype), tokens, context.device)
            expected = exact(bench.x, bench.g)
            for name, function in functions(("torch", "triton")).items():
                implementation, _, method = name.partition(":")
                if method not in METHODS:
                    continue
                row = {"what": "norm", "layer": str(bench.layer), "tokens": tokens, "impl": implementation}
                try:
                    found = function(bench.x, bench.g)
                except Exception as error:  # a kernel that cannot run here is a result
                    wrong += context.device == "cuda"
                    context.add(**row, method=method, reason=reason_of(error))
                    continue
                off = float(((found.double() - expected) / expected).abs().max())
                good = off <= ALLOWED[dtype]
                wrong += not good
                context.add(**row, method=method, error=off, allowed=ALLOWED[dtype], good=good)
    return wrong


def steps(context: Context) -> int:
    """Rows for each model and strategy; returns how many were wrong."""
    wrong = 0
    for shape in SHAPES[:2] if context.rehearse else SHAPES:
        if context.left < 5:
            context.add(what="step", shape=str(shape), reason="not run: no time left")
            continue
        expected = oracle.expectations(shape, context.device)
        for strategy in STRATEGIES:
            row = {"what": "step", "shape": str(shape), "strategy": strategy}
            try:
                error = error_of(Case(shape, context.device, strategy).check()["digest"], expected["all"])
            except Exception as failed:  # such as Triton on a CPU
                wrong += context.device == "cuda"
                context.add(**row, reason=reason_of(failed))
                continue
            good = error.within(expected["limit"])
            wrong += not good
            context.add(**row, error=error.whole, worst=error.worst, where=error.where, good=good)
    return wrong
