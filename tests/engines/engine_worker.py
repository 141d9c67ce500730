"""All that one launch of an engine tests, in the same ranks: a launch imports for longer than a case takes.

    accelerate launch --config_file ... engine_worker.py OUTPUT_FOLDER all|matrix|hybrid|sequence [disagree]

``all`` is the matrix and its situations (``matrix_worker.py``), clip norms (``clip_norms_worker.py``), users
(``users_worker.py``), balls and bins and secure noise (``mechanisms_worker.py``), a corrected second moment
(``corrected_worker.py``), correlated noise
(``correlated_worker.py``), and then what two ranks refuse: ``disagree`` is for ``refusals_worker.py``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch.distributed as dist

from dpft.engines import sums
from tests.engines import (
    clip_norms_worker,
    corrected_worker,
    correlated_worker,
    matrix_worker,
    mechanisms_worker,
    sequence_worker,
    users_worker,
)

if __name__ == "__main__":
    output, which = Path(sys.argv[1]), sys.argv[2]
    bucket = sums.BUCKET
    bench = sequence_worker.run(output) if which == "sequence" else matrix_worker.run(output, which)
    if which in ("all", "matrix"):
        clip_norms_worker.run(bench)
        users_worker.run(bench)
        mechanisms_worker.run(bench)
        corrected_worker.run(bench)
    if which != "sequence":
        correlated_worker.run(bench)
    if which == "all":
        bench.forget()
        sums.BUCKET = bucket
        sys.argv[1:] = [str(output / "refusals"), *sys.argv[3:]]
        runpy.run_module("tests.engines.refusals_worker", run_name="__main__")
    elif dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
