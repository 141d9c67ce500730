"""Mutations of Trainer, of TRL's losses, and of examples of several rows."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

GROUPS = ("tests/clipping/test_groups.py",)
TRAINER, TRL = ("tests/trainer/test_trainer.py",), ("tests/trainer/test_trl.py",)

_GROUPS, _MIXIN, _STEPS = "dpft/rules/groups.py", "dpft/trainer/mixin.py", "dpft/trainer/steps.py"
_LOSSES, _PREFERENCE = "dpft/trainer/losses.py", "dpft/trainer/preference.py"

TRAINER_MUTATIONS = (
    Mutation(
        "absent_rows_counted",
        "an example with fewer rows gets another's in their place",
        _GROUPS,
        "if self.present is not None:",
        "if False:",
        GROUPS,
    ),
    Mutation(
        "rows_in_any_order",
        "rows are taken in the order of the batch, whatever example_ids say",
        _GROUPS,
        "index = order[torch.where(present, place, 0)]",
        "index = torch.where(present, place, 0)",
        GROUPS,
    ),
    Mutation(
        "first_row_of_a_vector",
        "the gradient of a norm's weight is that of an example's first row",
        "dpft/rules/parameter.py",
        "else grad.sum(1)",
        "else grad[:, 0]",
        GROUPS,
    ),
    Mutation(
        "losses_of_rows",
        "one loss for each row is accepted, each clipped by itself",
        "dpft/clipping/boundary.py",
        "if groups is not None and groups.examples != len(detached):",
        "if False:",
        GROUPS,
    ),
    Mutation(
        "clipped_again",
        "Trainer clips the noisy sum by max_grad_norm",
        _MIXIN,
        "        return None  # examples are clipped;",
        "        return super()._clip_grad_norm(model)  # examples are clipped;",
        TRAINER,
    ),
    Mutation(
        "smoothed_over_the_batch",
        "label smoothing and compute_loss_func see the whole batch",
        _LOSSES,
        "own = None if labels is None else labels[i : i + 1]",
        "row, own = out, labels",
        TRAINER,
    ),
    Mutation(
        "full_ledger_ends_quietly",
        "a second training on a full ledger trains nothing, without an error",
        _STEPS,
        "loader.privacy.check_start()",
        "pass",
        TRAINER,
    ),
    Mutation(
        "losses_in_the_card",
        "the model card shows the training loss",
        _MIXIN,
        "{k: v for k, v in row.items() if k in _PUBLIC}",
        "dict(row)",
        TRAINER,
    ),
    Mutation(
        "pairs_of_neighbours",
        "a pair is taken for two neighbouring rows",
        _PREFERENCE,
        "torch.arange(len(items)).repeat(2)",
        "torch.arange(len(items)).repeat_interleave(2)",
        TRL,
    ),
    Mutation(
        "loss_of_all_pairs",
        "each pair's loss is that of the first",
        _PREFERENCE,
        "SimpleNamespace(**{name: value[i] for name, value in by_pair.items()})",
        "SimpleNamespace(**{name: value[0] for name, value in by_pair.items()})",
        TRL,
    ),
)
