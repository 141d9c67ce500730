"""Time, FLOPs and memory of one training step: plain, ours, Opacus, fastDP; each in a process of its own, in turns.

    python tools/benchmark_steps.py --preset cpu --json steps_cpu.json
    python tools/benchmark_steps.py --preset gpu --json steps_gpu.json
    python tools/benchmark_steps.py --architecture gpt2 --tokens 512 1024 --rows 1 4 --methods plain one_pass fastdp

Every method makes the same model from the same seed and takes the same batch, forward and backward, to the clipped
sum; noise and the optimiser are left out unless --update asks for them. Ratios of time are to the plain step of the
same round. A method whose clipped sum is not what float64 autograd gives one example at a time, at a small size, or
not that of our per-example strategy at the size that is timed, is refused a time. Memory is bytes of live tensors (on
a GPU: of its allocator) above parameters, buffers and batch, with empty .grad, in a step of its own. dpft's first
steps, and those with its isolation check, are not what a run of thousands consists of: tiny ones take their place.

With --json the results are written after every shape, and a plot beside them. "predicted" is what dpft.plan says.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.benchmarks.cases import METHODS, Shape, find_method
from tools.benchmarks.plots import plot_steps
from tools.benchmarks.presets import EVERYTHING, PRESETS, Longest, Preset, Run
from tools.benchmarks.runner import GRACE, Budget, Machine, ShapeRunner, longest_context
from tools.common.conditions import conditions, describe_device
from tools.common.json_files import json_path, write_json
from tools.common.meter import MIB

ARCHITECTURES = ("llama", "gpt2")
HAND = ("architecture", "width", "layers", "vocab", "tokens", "rows", "dtype", "checkpointing", "update", "methods")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "gpu", "smoke"), help="instead of the shapes below")
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    for name in ("width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", help="T, one or several")
    parser.add_argument("--rows", type=int, nargs="+", help="B, one or several")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", choices=("off", "on", "both"))
    parser.add_argument("--update", action="store_true", default=None, help="with AdamW, and for ours with noise")
    parser.add_argument("--methods", nargs="+", help="names, or module:function of your own")
    parser.add_argument("--alone", action="store_true", help="one process after the other, not in turns")
    parser.add_argument("--longest", type=int, nargs=3, metavar=("START", "STEP", "MOST"), help="search the longest T")
    parser.add_argument("--rounds", type=int, help="of every shape, in the place of the preset's")
    parser.add_argument("--seconds", type=float, help="time budget; what does not fit into it is skipped, and says so")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="for a process, beyond its model")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's, or cuda where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args()
    given = [name for name in HAND if getattr(args, name) is not None]
    if args.preset and given:
        parser.error(f"--preset {args.preset} brings its own shapes; got --{given[0]} too. Leave one of them out")
    for name in ("width", "layers", "vocab", "rounds", "seconds", "threads", "memory_limit"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "rounds" else 1e-9):
            parser.error(f"--{name} is {value}; expected a positive number")
    for value in [*(args.tokens or []), *(args.rows or [])]:
        if value < 1:
            parser.error(f"--tokens and --rows are numbers above 0; got {value}")
    return args


def by_hand(args: argparse.Namespace) -> Preset:
    """The shapes that the options name; T, B and checkpointing in every combination."""
    fields = {name: getattr(args, name) for name in ("architecture", "width", "layers", "vocab", "dtype", "update")}
    base = Shape(**{name: value for name, value in fields.items() if value is not None})
    kinds = {"off": [False], "on": [True], "both": [False, True]}[args.checkpointing or "off"]
    methods = tuple(args.methods or EVERYTHING)
    lengths, sizes = args.tokens or [base.tokens], args.rows or [base.rows]
    shapes = [replace(base, tokens=t, rows=b, checkpointing=c) for c, b, t in itertools.product(kinds, sizes, lengths)]
    parts: list[Run | Longest] = [Run(shape, methods, alone=args.alone) for shape in shapes]
    if args.longest:
        start, step, most = args.longest
        parts = parts if args.tokens else []
        for c, b in itertools.product(kinds, sizes):
            longest = replace(base, tokens=most, rows=b, checkpointing=c)
            parts.append(Longest(longest, methods, start, step, most))
    return Preset("cuda" if torch.cuda.is_available() else "cpu", tuple(parts), 3600.0)


def _times(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})" if spread else "-"


def table(result: dict[str, Any]) -> str:
    """What is printed of a shape."""
    lines = [
        f"\n{result['title']}",
        f"  {'':13} {'time x plain':22} {'predicted':9} {'seconds':>8} {'memory MiB':>10} {'predicted':>9} "
        f"{'x plain':>7} {'FLOPs x':>7}  error",
    ]
    reasons = {row.get("reason") for row in result["rows"]}
    if len(reasons) == 1 and None not in reasons:
        return f"\n{result['title']}: {reasons.pop()}"
    plan = result.get("plan", {})
    for row in result["rows"]:
        predicted = {**plan.get("strategies", {}), "plain": plan.get("plain", {})}.get(row["method"], {})
        if "reason" in row:
            lines.append(f"  {row['method']:13} {row['reason']}")
            continue
        cells = {
            "time": _times(row.get("time_ratio")),
            "ratio": f"{predicted['time_ratio']:.2f}" if "time_ratio" in predicted else "-",
            "seconds": f"{row['seconds']['median']:.3f}" if "seconds" in row else "-",
            "peak": f"{row['peak_bytes'] / MIB:.1f}" if "peak_bytes" in row else "-",
            "promised": f"{predicted['peak_bytes'] / MIB:.1f}" if "peak_bytes" in predicted else "-",
            "memory": f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "-",
            "flops": f"{row['flops_ratio']:.3f}" if "flops_ratio" in row else "-",
            "error": f"{row['error']:.0e}" if "error" in row else "",
        }
        notes = "; ".join(row[key] for key in ("note", "cut", "unchecked") if row.get(key))
        lines.append(
            f"  {row['method']:13} {cells['time']:22} {cells['ratio']:9} {cells['seconds']:>8} {cells['peak']:>10} "
            f"{cells['promised']:>9} {cells['memory']:>7} {cells['flops']:>7}  {cells['error']:5}  {notes}".rstrip()
        )
    for peer, ratio in result["speedups"].items():
        lines.append(f"  one_pass is {_times(ratio)} x as fast as {peer}")
    auto = result.get("auto")
    if auto and "best" in auto:
        slower = f"{auto['choice']} was {100 * auto['slower']:.1f} % slower"
        lines.append(f"  auto chose {auto['choice']}; best was {auto['best']}; {slower}")
    elif auto:
        lines.append(f"  auto chose {auto['choice'] or 'nothing'}: {auto['reason']}")
    return "\n".join(lines)


def longest_table(found: dict[str, Any]) -> str:
    """What is printed of a search."""
    lines = [f"\nlongest context of {found['title']}, to {found['step']} tokens"]
    for row in found["rows"]:
        lines.append(f"  {row['method']:13} {row['tokens']:8}  {row.get('reason', '')}".rstrip())
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress, to the terminal's error stream."""
    print(f"  ... {line}", file=sys.stderr, flush=True)


def main(args: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main(parse()))
