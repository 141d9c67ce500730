"""What a step costs under each engine, plain and private: bytes sent, traversals, FLOPs, memory. On the CPU, counted.

    python tools/measure_engines.py --json docs/benchmarks/engines_cpu.json
    python tools/measure_engines.py --engines fsdp2 zero3 --width 128 --tokens 64

Two processes, by `accelerate launch` with the ready configurations, a small Llama, float32, AdamW. Plain training is
Accelerate's own: prepare(model, optimizer), accelerator.accumulate. Nothing is timed, so a busy machine does no harm.

Bytes are payload: of an all-gather and a reduce-scatter the whole, of the others the tensor. A ring of W ranks sends
2 (W-1)/W of an all-reduce's payload from each rank, and (W-1)/W of the others'. Memory is bytes of live tensors on
rank 0, parameters and optimiser states included: at rest (between steps), at the peak of a step, and added between two
physical batches of one logical batch. All in units of the float32 bytes of all parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("engines") / "worker.py"
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload")
STRATEGIES = ("plain", "one_pass", "two_pass", "per_example")
TWO_WAYS = ("all_reduce",)
GRADIENTS = ("all_reduce", "reduce_scatter", "reduce")
LIMIT = 900.0  # seconds for one engine


def cases() -> list[dict[str, Any]]:
    """Every strategy; with checkpointing, and with four physical batches a logical one, those of the whole batch."""
    once = [{"strategy": s, "checkpointing": False, "physical": 1} for s in STRATEGIES]
    again = [{"strategy": s, "checkpointing": True, "physical": 1} for s in STRATEGIES[:3]]
    return once + again + [{"strategy": s, "checkpointing": False, "physical": 4} for s in STRATEGIES[:3]]


def launch(engine: str, options: dict[str, Any], scratch: Path) -> list[dict[str, Any]]:
    """Run the worker under one engine; what each rank counted.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    command = [
        *(str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2"),
        *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml"), "--main_process_port", "0"),
        *(str(WORKER), json.dumps(options), str(scratch)),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
    }
    done = subprocess.run(
        command,
        cwd=scratch,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{engine} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return [json.loads((scratch / f"costs_{rank}.json").read_text()) for rank in range(2)]


def rows(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a case, of rank 0, in units of the parameters' bytes, and beside plain training of the same case."""
    world, unit = ranks[0]["world"], 4 * ranks[0]["parameters"]
    made: list[dict[str, Any]] = []
    for facts, other in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        if facts["bytes"] != other["bytes"]:
            raise RuntimeError(f"the ranks counted different collectives: {facts['bytes']} and {other['bytes']}")
        share = (world - 1) / world
        wire = sum(n * share * (2 if kind in TWO_WAYS else 1) for kind, n in facts["bytes"].items())
        row = {
            **{key: facts[key] for key in ("strategy", "checkpointing", "physical", "traversals", "flops", "calls")},
            "payload": {kind: n / unit for kind, n in facts["bytes"].items()},
            "gathered": facts["bytes"].get("all_gather", 0) / unit,
            "reduced": sum(facts["bytes"].get(kind, 0) for kind in GRADIENTS) / unit,
            "wire": wire / unit,
            "rest": facts["rest"] / unit,
            "peak": facts["peak"] / unit,
            "held_between": facts["held_between"] / unit,
        }
        same = ("checkpointing", "physical")
        plain = next(r for r in [*made, row] if r["strategy"] == "plain" and all(r[k] == row[k] for k in same))
        for key in ("flops", "wire", "peak"):
            row[f"{key}_ratio"] = row[key] / plain[key]
        made.append(row)
    return made


def rounded(value: Any) -> Any:
    """Fractions to four places, so that the file can be read."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def table(engine: str, made: list[dict[str, Any]]) -> str:
    """What is printed."""
    lines = [
        f"\n{engine:13} ckpt phys traversals  FLOPs   gathered  reduced  sent a rank      rest  peak           between"
    ]
    for r in made:
        lines.append(
            f"  {r['strategy']:11} {'yes' if r['checkpointing'] else 'no':4} {r['physical']:4} {r['traversals']:10}  "
            f"{r['flops_ratio']:.3f} x {r['gathered']:8.2f} {r['reduced']:8.2f}  {r['wire']:5.2f} = "
            f"{r['wire_ratio']:.2f} x  {r['rest']:5.2f}  {r['peak']:.2f} = {r['peak_ratio']:.2f} x  "
            f"{r['held_between']:5.2f}"
        )
    return "\n".join(lines)


def conditions() -> dict[str, Any]:
    """Machine, versions, commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "backend": "gloo, CPU, 2 processes of one thread",
        "python": platform.python_version(),
        "versions": {n: metadata.version(n) for n in ("torch", "accelerate", "deepspeed", "transformers")},
        "commit": commit.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("layers", 4), ("tokens", 256), ("vocab", 1000), ("rows", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = {name: getattr(args, name) for name in ("width", "layers", "tokens", "vocab", "rows")}
    results: dict[str, Any] = {}
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            ranks = launch(engine, {**shapes, "cases": cases()}, Path(scratch))
        made = rows(ranks)
        print(table(engine, made), flush=True)
        results[engine] = [rounded(row) for row in made]
        shapes["parameters"] = ranks[0]["parameters"]
    if args.json:
        report = {"shapes": shapes, "conditions": conditions(), "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
