"""benchmark_norms.py: every layer at every length, within a budget of time, printed and kept."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.norm_options import PRESETS, Preset, by_hand
from tools.benchmarks.norm_tables import Layer, plot_norms, seeds_table, table
from tools.benchmarks.norm_times import Bench, functions
from tools.common.conditions import conditions, describe_device
from tools.common.failures import reason_of
from tools.common.json_files import write_json


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


def sizes(preset: Preset) -> Iterator[tuple[Layer, int]]:
    """Every layer with each of its lengths, the shortest first."""
    for layer, lengths in preset.layers:
        yield from ((layer, tokens) for tokens in sorted(lengths))


def execute(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status: 2 where it cannot be done, 130 interrupted."""
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
