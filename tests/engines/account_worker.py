"""Two ranks that pay from one account. Run by ``test_account_ranks.py`` under ``accelerate launch``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dpft
from tests.engines.on_cpu import make_accelerator
from tests.training import Training, config, examples

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = make_accelerator()
    file = folder / "account.jsonl"
    mechanism = config().resolve(len(examples())).mechanism
    if accelerator.is_main_process:
        account = dpft.Account.create(file, epsilon=20.0, delta=1e-3)
        account.reserve("other", [(mechanism, account.max_steps(mechanism) - 3)], "another training")
    accelerator.wait_for_everyone()
    seen: dict[str, Any] = {}
    try:
        options = {"accelerator": accelerator, "test_seed": None, "account": file}
        Training(folder / "long.jsonl", changes={"num_steps": 4}, **options)
    except dpft.BudgetExceededError as error:
        seen["refused"] = str(error)
    # Only rank 0 needs the file.
    private = Training(
        folder / "ledger.jsonl",
        **{**options, "account": file if accelerator.is_main_process else folder / "not here"},
    )
    private.train(2)
    accelerator.wait_for_everyone()
    seen["open"] = [count for _, count in dpft.Account.open(file).entries()[-1].uses]
    accelerator.wait_for_everyone()
    private.run.close()
    accelerator.wait_for_everyone()
    seen["closed"] = [count for _, count in dpft.Account.open(file).entries()[-1].uses]
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(seen))
