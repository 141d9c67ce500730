"""--audit: random canary records in the training data, and what the final model shows of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn

from accelerate import Accelerator
from dpft.audit import BlackBoxAudit, Canaries, black_box, draw_canaries, plot
from finetune.data.users import Users
from finetune.engine import from_first
from finetune.evaluation import record_losses
from finetune.materials import Materials
from finetune.options import Options

AUDIT, CANARIES, PICTURE = "audit.json", "canaries.json", "audit.png"
TOKENS = 32  # of a canary, or the longest example if that is shorter
FILES = (
    f"`{AUDIT}`, `{CANARIES}` and the picture are made of the weights and the canaries alone: what the epsilon says "
    "of the private records holds for them too."
)


@dataclass
class Audit:
    """The canaries of a run.

    Attributes:
        canaries: records and coins.
        before: loss of each by the model before the training; empty until it is known.
    """

    canaries: Canaries
    before: list[float]

    @property
    def note(self) -> str:
        """What the privacy statement must say of a training that is audited."""
        return (
            f"to audit the run, {len(self.canaries.included)} records of random tokens are in the training data, "
            f"too: {len(self.canaries.records)} were made, and each was put in with probability 1/2"
        )


def begin(accelerator: Accelerator, options: Options, materials: Materials, output: Path) -> Audit:
    """Put canaries into the training data; those of the run that is resumed, or new ones. The same on all ranks.

    Raises:
        ValueError: the run to resume was not audited, or not with as many canaries; or examples are not texts alone.
    """
    users = isinstance(materials.train, Users)
    if not users and materials.train.column_names != ["input_ids"]:
        raise ValueError(
            "--audit puts in texts of random tokens, and here an example has more than its text. Leave it out; "
            "dpft.audit audits any training."
        )

    def kept_or_drawn() -> dict[str, Any]:
        path = output / CANARIES
        if options.resume_from_checkpoint and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        drawn = draw_canaries(
            options.audit, tokens=min(TOKENS, options.row_tokens), vocabulary=len(materials.tokenizer)
        )
        return {**drawn.to_dict(), "losses_before": []}

    found = from_first(accelerator, kept_or_drawn)
    audit = Audit(Canaries.from_dict(found), found["losses_before"])
    if len(audit.canaries.records) != options.audit:
        raise ValueError(
            f"--audit {options.audit}: the run to resume has {len(audit.canaries.records)} canaries. Give that number."
        )
    included = [list(record) for record in audit.canaries.included]
    if users:  # each is a user of its own, as the claim is about users
        materials.train = materials.train.with_users([[record] for record in included])
        return audit
    added = Dataset.from_dict({"input_ids": included})
    materials.train = concatenate_datasets([materials.train, added.cast(materials.train.features)])
    return audit


def measure_before(
    audit: Audit, accelerator: Accelerator, model: nn.Module, materials: Materials, output: Path
) -> None:
    """The canaries' losses before the first step, kept with the canaries for a run that is resumed. A collective."""
    if audit.before:
        return
    audit.before = losses(audit, accelerator, model, materials)
    if accelerator.is_main_process:
        kept = {**audit.canaries.to_dict(), "losses_before": audit.before}
        (output / CANARIES).write_text(json.dumps(kept) + "\n", encoding="utf-8")


def losses(audit: Audit, accelerator: Accelerator, model: nn.Module, materials: Materials) -> list[float]:
    """The loss of every canary. A collective."""
    examples = [{"input_ids": list(record)} for record in audit.canaries.records]
    return record_losses(model, examples, materials.collate, accelerator)


def finish(audit: Audit, after: list[float], epsilon: float | None, delta: float, output: Path) -> BlackBoxAudit:
    """Attack the final model; leaves the JSON and the picture. For one rank.

    Args:
        audit: with the losses before.
        after: losses of the canaries by the final model.
        epsilon: that was spent; None if the run is not private.
        delta: of the claim.
        output: the run's folder.
    """
    found = black_box(audit.before, after, audit.canaries.coins, claimed_epsilon=epsilon, delta=delta)
    (output / AUDIT).write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    plot(found, output / PICTURE)
    return found


def section(found: BlackBoxAudit) -> str:
    """The section of the model card."""
    return f"## Audit\n\n{found.statement} {FILES}\n\n![Scores and ROC]({PICTURE})\n"
