"""benchmark_steps.py: every shape of a preset or of the command line, measured, printed and kept."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.cases import METHODS, find_method
from tools.benchmarks.plots import plot_steps
from tools.benchmarks.presets import PRESETS, Run
from tools.benchmarks.runner import GRACE, Budget, Machine, ShapeRunner, longest_context
from tools.benchmarks.step_options import by_hand
from tools.benchmarks.step_tables import longest_table, table
from tools.common.command_line import say
from tools.common.conditions import conditions, describe_device
from tools.common.json_files import write_json


def execute(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status: 2 where it cannot be done, 130 interrupted."""
    try:
        preset = PRESETS[args.preset] if args.preset else by_hand(args)
        for name in {name for part in preset.parts for name in part.methods}:
            find_method(name)
    except (ValueError, ImportError, AttributeError) as error:
        print(f"benchmark_steps: {error}. Methods: {', '.join(METHODS)}", file=sys.stderr)
        return 2
    device = args.device or preset.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmark_steps: it is to run on a GPU, and torch finds none. --device cpu?", file=sys.stderr)
        return 2
    limit = int(args.memory_limit * 2**30) if args.memory_limit else None
    # The libraries read these when the processes import them.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # who waits for a turn must not spin
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    machine = Machine(device, args.threads, limit)
    budget = Budget(args.seconds or preset.seconds)
    report: dict[str, Any] = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "conditions": conditions(args.threads),
        "results": [],
        "longest": [],
    }
    with machine.worker("describe") as worker:
        report["conditions"].update(worker.ask(describe_device, device, seconds=10 * GRACE))

    def keep(results: str, found: dict[str, Any]) -> None:
        report[results].append(found)
        report["conditions"]["seconds_taken"] = budget.seconds - budget.left
        if args.json:
            write_json(args.json, report)

    try:
        for part in preset.parts:
            say(str(part.shape))
            if isinstance(part, Run):
                run = part if args.rounds is None else replace(part, rounds=args.rounds)
                result = ShapeRunner(run, machine, budget, say).result()
                print(table(result), flush=True)
                keep("results", result)
            else:
                rows = longest_context(part, machine, budget, say)
                found = {"shape": asdict(part.shape), "title": str(part.shape), "step": part.step, "rows": rows}
                print(longest_table(found), flush=True)
                keep("longest", found)
    except KeyboardInterrupt:
        kept = f"; what was finished is in {args.json}" if args.json else ""
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    if args.json and report["results"]:
        plot_steps(args.json.with_suffix(".png"), report)
    print(f"\n{budget.seconds - budget.left:.0f} s")
    return 0
