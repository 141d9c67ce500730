"""Attack dpft: does what it releases have the privacy that it states, and would the attack notice if it had not?

    python tools/audit.py                                    # dpft as it is, one seed
    python tools/audit.py --plant all --seeds 20 --output docs/benchmarks/audit
    python tools/audit.py --plant half_noise

A white-box audit (`dpft.audit.white_box`) of a small model on the CPU. --plant breaks the mechanism first; "all" is
dpft as it is and every broken one. Status 0: what is sound was not refuted, and what is broken was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dpft.audit import WhiteBoxAudit, plot
from tools.auditing import campaign
from tools.auditing.plants import NONE, PLANTS, find_plant
from tools.common.conditions import conditions
from tools.common.json_files import write_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [plant.name for plant in PLANTS]
    parser.add_argument(
        "--plant", default="none", choices=["none", "all", *names], metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--seeds", type=int, default=1, help="audits of dpft as it is (default 1)")
    parser.add_argument("--steps", type=int, default=300, help="releases of an audit (default 300)")
    parser.add_argument("--canaries", type=int, default=16, help="canaries of an audit (default 16)")
    parser.add_argument("--output", type=Path, default=Path("outputs/audit"), help="folder of audit.json and pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the audits; 0 if each ended as it should."""
    args = parse(argv)
    campaign.quieten()
    plants = [NONE, *PLANTS] if args.plant == "all" else [find_plant(args.plant)]
    found = conditions(torch.get_num_threads()) | {"steps": args.steps, "canaries": args.canaries, "seeds": args.seeds}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any], audit: WhiteBoxAudit) -> None:
        rows.append(row)
        write_json(args.output / "audit.json", {"conditions": found, "audits": rows})
        if row["seed"] == 0:
            plot(audit, args.output / f"{row['plant']}.png")
        print(f"--- {row['plant']}, seed {row['seed']}: {row['what']}\n{audit.describe()}\n", flush=True)

    campaign.run(plants, args.seeds, args.steps, args.canaries, keep)
    print(campaign.table(rows))
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
