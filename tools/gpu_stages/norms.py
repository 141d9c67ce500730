"""Norms of single layers by torch and by Triton, and which of the two ``impl="auto"`` should take at which shape."""

from __future__ import annotations

import functools

from tools.benchmarks.norm_tables import Layer
from tools.benchmarks.norm_times import Bench, functions
from tools.common.failures import reason_of
from tools.gpu_stages.context import Context

LAYERS = (
    Layer(2048, 2048, 1, "bfloat16"),
    Layer(2048, 5632, 1, "bfloat16"),
    Layer(2048, 32_000, 1, "bfloat16"),
    Layer(2048, 2048, 16, "bfloat16"),
    Layer(1024, 1024, 1, "float32"),
)
TOKENS = tuple(512 << k for k in range(7))  # to 32,768
ROUNDS = 5


def run(context: Context) -> None:
    """One row for each layer and length with the times of all, the best, and what is slower by how much."""
    layers = (Layer(48, 32, 2), Layer(24, 200)) if context.rehearse else LAYERS
    chosen = {name: function for name, function in functions(("torch", "triton")).items() if ":" in name}
    for tokens in (64, 96) if context.rehearse else TOKENS:
        for layer in layers:
            if context.left < 2:
                context.add(layer=str(layer), tokens=tokens, reason="not run: no time left")
                continue
            skip = functools.partial(lambda name: "" if context.left > 1 else "not run: no time left")
            try:
                rows = Bench(layer, tokens, context.device).run(chosen, ROUNDS, skip)["rows"]
            except Exception as error:  # not even the float64 product fits
                context.add(layer=str(layer), tokens=tokens, reason=reason_of(error))
                continue
            timed = {row["method"]: row["seconds"]["median"] for row in rows if "seconds" in row}
            best = min(timed, key=lambda name: timed[name], default=None)
            autos = {name: timed[name] for name in ("torch:auto", "triton:auto") if name in timed}
            take = min(autos, key=lambda name: autos[name]).partition(":")[0] if autos else None
            context.add(
                layer=str(layer),
                tokens=tokens,
                seconds=timed,
                reasons={row["method"]: row["reason"] for row in rows if "reason" in row},
                best=best,
                auto_should_take=take,
            )
