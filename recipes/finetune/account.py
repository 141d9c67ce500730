"""--account: what a run may spend of the budget that all uses of its records share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dpft
from accelerate import Accelerator
from finetune.engine import from_first
from finetune.options import Options


def check_account(options: Options, schedule: dpft.PrivacySchedule, accelerator: Accelerator) -> str | None:
    """See that the releases of a new run fit, before anything is written. A collective.

    ``dpft.prepare`` reserves them. A run that is resumed has its reservation there, which ``dpft.prepare`` replaces.

    Args:
        options: of the run.
        schedule: what it would release.
        accelerator: of the run; the first process alone reads the file.

    Returns:
        What is left, in words; None without an account, or where a run is resumed.

    Raises:
        ValueError: they do not fit, or no theorem composes them with the account, or there is none.
    """
    if options.account is None or options.resume_from_checkpoint:
        return None
    file = Path(options.account).expanduser()
    unit = "example" if options.user_column is None else "user"
    return from_first(accelerator, lambda: _left(file, schedule, unit))


def _left(file: Path, schedule: dpft.PrivacySchedule, unit: str) -> str:
    mechanism, steps = schedule.mechanism, schedule.num_steps
    try:
        account = dpft.Account.open(file)
        if account.protects.unit != unit:
            raise ValueError(
                f"--account {file} counts what each {account.protects.unit} loses, and the examples of this run are "
                f"{unit}s. Give the account of the {unit}s; --user-column makes users the examples."
            )
        fitting = account.max_steps(mechanism, limit=steps)
        by = "" if account.order is None else f" (what fits is counted at the Renyi order {account.order:g})"
        spent = f"{account.spent():.4g} of epsilon {account.epsilon:g} at delta {account.delta:g} is spent or reserved"
        if fitting == steps:
            return f"{file}: {spent}, and the {steps} steps of this run fit{by}"
        pending = sum(entry.open for entry in account.entries())
        enough = _enough(account, mechanism, steps)
    except dpft.DPFTError as error:
        raise ValueError(f"--account {file}: {error}") from error
    settle = f"; {pending} reservations are open: dpft account settle frees those of runs that died" if pending else ""
    raise ValueError(
        f"--account {file}: {steps} steps with noise multiplier {mechanism.noise_multiplier:.4g} do not fit: {spent}"
        f"{settle}. Of such steps {fitting} fit{by}; {enough}. Nothing was released."
    )


def _enough(account: dpft.Account, mechanism: Any, steps: int) -> str:
    """The noise with which all steps fit, in words."""
    try:
        return f"all of them with --noise-multiplier {account.noise_multiplier(mechanism, steps):.4g}"
    except dpft.BudgetExceededError:
        return "no noise makes all of them fit"
