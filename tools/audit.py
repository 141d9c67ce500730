"""Attack dpft: does what it releases have the privacy that it states, and would the attack notice if it had not?

    python tools/audit.py                                    # everything as it is, one seed
    python tools/audit.py --subject white_box --plant all --seeds 20 --output docs/benchmarks/audit
    python tools/audit.py --plant half_noise

Audits of small models on the CPU: step by step (`dpft.audit.white_box`), of whole trainings, and of queries
(`dpft.audit.two_worlds`). --subject: some of them only. --plant breaks the mechanism first; "all" is everything as it
is, and every broken one. Status 0: what is sound was not refuted, and what is broken was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dpft.audit import plot
from tools.auditing import campaign
from tools.auditing.catalogue import ALL_PLANTS, SUBJECTS, Audit, find_plant, nothing_in
from tools.common.conditions import conditions
from tools.common.json_files import write_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, subjects = [plant.name for plant in ALL_PLANTS], [subject.name for subject in SUBJECTS]
    parser.add_argument(
        "--plant", default="none", choices=["none", "all", *names], metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--subject", choices=subjects, nargs="+", metavar="NAME", help=f"only these: {', '.join(subjects)}"
    )
    parser.add_argument("--seeds", type=int, default=1, help="audits of each subject as it is (default 1)")
    parser.add_argument("--steps", type=int, default=300, help="releases of an audit step by step (default 300)")
    parser.add_argument("--canaries", type=int, default=16, help="canaries of an audit step by step (default 16)")
    parser.add_argument("--output", type=Path, default=Path("outputs/audit"), help="folder of the JSON and pictures")
    parser.add_argument("--name", default="audit", help="of the JSON file, without .json (default audit)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the audits; 0 if each ended as it should."""
    args = parse(argv)
    campaign.quieten()
    sound = [nothing_in(subject.name) for subject in SUBJECTS]
    every = sound + list(ALL_PLANTS) if args.plant == "all" else sound if args.plant == "none" else []
    chosen = every or [find_plant(args.plant)]
    plants = [plant for plant in chosen if not args.subject or plant.subject in args.subject]
    found = conditions(torch.get_num_threads()) | {"steps": args.steps, "canaries": args.canaries, "seeds": args.seeds}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any], audit: Audit) -> None:
        rows.append(row)
        write_json(args.output / f"{args.name}.json", {"conditions": found, "audits": rows})
        if row["seed"] == 0:
            named = row["subject"] if row["plant"] == "none" and row["subject"] != "white_box" else row["plant"]
            plot(audit, args.output / f"{named}.png")
        print(f"--- {row['plant']}, seed {row['seed']}: {row['what']}\n{audit.describe()}\n", flush=True)

    campaign.run(plants, args.seeds, args.steps, args.canaries, keep)
    print(campaign.table(rows))
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
