"""Kills the ranks of a private training at random instants, resumes it, and checks that nothing was lost or repeated.

    python tools/kill_ranks.py --engine zero2 --kills 200
    python tools/kill_ranks.py --engine ddp --kills 5 --seed 3 --device cpu --json kills.json

A tiny training (faults/worker.py) runs by `accelerate launch` with a ready configuration. Then one rank, all ranks
or the launcher get SIGKILL; or one rank hangs: it waits for ever, or gets SIGSTOP (SIGTERM does not end that one: the
launcher sends SIGKILL 30 s later). This happens while a run is prepared or resumed, in a backward pass, between the
ledger's line and the parameters' change, after that change, while a checkpoint is written, or at any moment. The next
start resumes from the last whole checkpoint. Checked, by the ranks' own records and not by dpft's word alone:

- the ledger's count never falls, is never below the number of releases that an optimiser was given, and is above it by
  one for each kill at most;
- epsilon after a resume is at least the accountant's for the releases that were seen;
- no four consecutive values of noise occur a second time, on any rank, in any release of any start (replicas, under
  DDP, must be given the same);
- the last checkpoint that was written to its end is the one that loads, as the parameters that were saved;
- a run of which a rank died or hung ends on all ranks, with a status that is not zero, and says why. After SIGKILL of
  the launcher nobody is left to end the ranks: as long as they live, they must hold the ledger.

Prints a table and one line of JSON with the conditions; exit status 1 if anything was violated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.faults.command import main

if __name__ == "__main__":
    main(__doc__)
