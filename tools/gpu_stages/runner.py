"""The stages one after the other, each in a process with a time limit, within one budget."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.common.command_line import say
from tools.common.conditions import conditions, describe_device
from tools.common.failures import reason_of
from tools.common.json_files import write_json
from tools.gpu_stages.context import DONE, FAILED, SKIPPED, Context
from tools.gpu_stages.stages import STAGES, Stage, find_stage
from tools.gpu_stages.summary import summary

ENTRY = Path(__file__).resolve().parents[1] / "gpu.py"
GRACE = 5.0  # seconds that a stage gets beyond what it plans with, to write its last row
SLOWER = 4  # times the limit, in a rehearsal
LEAST = 0.25  # of a stage's time: with less left it is not begun


def execute(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status, which tools/gpu.py explains."""
    if args.list:
        for stage in STAGES:
            print(f"{stage.name:9} {stage.seconds:4.0f} s  {stage.what}")
        return 0
    if args.stage:
        return run_stage(find_stage(args.stage), args)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch finds no GPU. --rehearse runs every stage on the CPU", file=sys.stderr)
        return 2
    chosen = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    if args.rehearse:  # the limits are a GPU's; here other processes may have the cores, and nothing is measured
        chosen = [replace(stage, seconds=stage.seconds * SLOWER) for stage in chosen]
    if args.skip:
        chosen = [s for s in chosen if not has_result(args.output / f"{s.name}.json", args.rehearse)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended early, it still writes its summary
    args.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.rehearse else "cuda"
    found = conditions(torch.get_num_threads()) | describe_device(device) | {"rehearsal": args.rehearse}
    write_json(args.output / "conditions.json", found | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    try:
        run_all(chosen, args.seconds, args.output, lambda stage, seconds: apart(stage, seconds, args))
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found is in {args.output}", file=sys.stderr)
        return 130
    finally:
        text = summary(args.output)
        (args.output / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    statuses = [json.loads((args.output / f"{stage.name}.json").read_text())["status"] for stage in chosen]
    return int(any(status not in (DONE, SKIPPED) for status in statuses))


def has_result(path: Path, rehearsal: bool) -> bool:
    """Whether a stage was done to its end, on a GPU or in a rehearsal."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return bool(found) and found["status"] == DONE and found["rehearsal"] == rehearsal


def run_all(stages: Sequence[Stage], budget: float, output: Path, run: Callable[[Stage, float], None]) -> None:
    """Run stages within ``budget`` seconds; the last one gets what is left, if that is enough to be of use.

    Args:
        stages: in order.
        budget: seconds.
        output: folder of the results.
        run: of one stage with its seconds; it leaves its file.
    """
    end = time.monotonic() + budget
    for stage in stages:
        seconds = min(stage.seconds, end - time.monotonic() - GRACE)
        if seconds < LEAST * stage.seconds:
            reason = f"{max(0.0, seconds):.0f} s of the budget were left, and it may take {stage.seconds:.0f} s"
            keep_status(output / f"{stage.name}.json", stage, SKIPPED, reason)
            continue
        say(f"{stage.name}, at most {seconds:.0f} s: {stage.what}")
        run(stage, seconds)


def apart(stage: Stage, seconds: float, args: argparse.Namespace) -> None:
    """Run one stage in a process of its own, which is ended with all its children when its time is over."""
    path = args.output / f"{stage.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(ENTRY), "--stage", stage.name, "--seconds", f"{seconds:.1f}"]
    command += ["--output", str(args.output), *(["--rehearse"] if args.rehearse else [])]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    with (args.output / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            status = process.wait(seconds + GRACE)
            reason = "" if status in (0, 1) else f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds + GRACE:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if reason:
        keep_status(path, stage, FAILED, reason)


def keep_status(path: Path, stage: Stage, status: str, reason: str) -> None:
    """Put a status into a stage's file, beside the rows that it has."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    write_json(path, {"stage": stage.name, **found, "status": status, "reason": reason})


def run_stage(stage: Stage, args: argparse.Namespace) -> int:
    """The process of one stage: 0, or 1 where it found something wrong or failed."""
    context = Context(args.output / f"{stage.name}.json", stage.name, args.rehearse, args.seconds)
    module, _, function = stage.run.partition(":")
    try:
        status = getattr(importlib.import_module(f"tools.gpu_stages.{module}"), function)(context)
    except Exception as error:  # whatever a library raises is a result
        traceback.print_exc()
        context.write(FAILED, reason=reason_of(error))
        return 1
    context.write(status or DONE)
    return int((status or DONE) != DONE)
