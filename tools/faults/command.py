"""kill_ranks.py: the command line, one campaign of random kills, and the result as JSON."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from tools.common.accelerate_launch import ENGINES
from tools.common.command_line import Parser
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.faults.campaign import Campaign, draw
from tools.faults.invariants import PROCESSES


def main(description: str | None, arguments: list[str] | None = None) -> None:
    """Read the command line, run the campaign, and exit with 1 where anything was violated."""
    parser = Parser("kill_ranks", description)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the kills; the training is seeded by nobody")
    parser.add_argument("--device", choices=("cpu", "auto"), default="auto", help="auto: two GPUs where there are two")
    parser.add_argument("--json", type=json_path, help="file for the whole result")
    args = parser.parse_args(arguments)
    cpu, rng = args.device == "cpu" or torch.cuda.device_count() < PROCESSES, random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill-ranks-") as folder:
        campaign = Campaign(args.engine, Path(folder), cpu, args.kills)
        wrong = campaign.run([draw(rng) for _ in range(args.kills)])
    result = {
        "engine": args.engine,
        "seed": args.seed,
        "kills": sum(s.kill is not None for s in campaign.starts),
        "releases": sum(s.released for s in campaign.starts),
        "ledger": campaign.starts[-1].ledger,
        "violations": wrong,
        "device": "cpu" if cpu else "cuda",
        "conditions": conditions(threads=1),
    }
    for line in wrong:
        print(f"VIOLATED: {line}")
    print(json.dumps(result))
    if args.json:
        rows = [
            {"kill": s.kill and asdict(s.kill), "released": s.released, "ledger": s.ledger, "status": s.status}
            for s in campaign.starts
        ]
        write_json(args.json, {**result, "starts": rows})
    raise SystemExit(1 if wrong else 0)
