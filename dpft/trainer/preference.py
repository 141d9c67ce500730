"""TRL's preference losses by example: a pair of answers is one example of two rows.

TRL concatenates a batch's chosen rows and its rejected rows, and averages the pairs' losses. Here one forward computes
the outputs of all rows, and TRL's own function is then called for each pair, with a model that returns that pair's
outputs: the loss of a pair is what TRL computes for it alone, whatever ``loss_type``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import PrivacyConfigError
from dpft.wrap import clipped_loss

# Of a pair, not of a row; everything else that TRL's collators return has the chosen rows, then the rejected ones.
_OF_PAIRS = frozenset({"ref_chosen_logps", "ref_rejected_logps", "margin"})
_NO_MODEL_INPUT = _OF_PAIRS | {"completion_mask", "example_weight"}


class PairCollate:
    """TRL's collator, with the pair of each row beside its batch.

    Args:
        collate: of the Trainer.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate(items))
        for name in _OF_PAIRS & batch.keys():
            batch[name] = torch.cat([batch[name], batch[name]])  # one entry for each row, as everything else
        batch["example_ids"] = torch.arange(len(items)).repeat(2)
        return batch


def check(trainer: Any) -> None:
    """Refuse what mixes pairs.

    Raises:
        PrivacyConfigError: says what to use instead.
    """
    if getattr(trainer, "aux_loss_enabled", False):
        raise PrivacyConfigError(
            "the router's auxiliary loss mixes the examples of a batch; set router_aux_loss_coef=0.0."
        )
    mixing = {"bco_pair", "aot", "aot_unpaired"} & set(getattr(trainer, "loss_types", ()))
    if mixing:
        raise PrivacyConfigError(
            f"loss_type {sorted(mixing)} compares the pairs of a batch with one another: no example would have a loss "
            "of its own. Use 'sigmoid', 'ipo', 'hinge' or another that is a mean over pairs."
        )


def private_pairs(owner: type) -> Callable[[Any, nn.Module, dict[str, Any]], Tensor]:
    """The private loss of a Trainer whose ``compute_loss`` ``owner`` defines: DPOTrainer or RewardTrainer."""
    fused = owner.__name__ == "DPOTrainer"

    def loss(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        weights = inputs["example_weight"]
        pairs = len(weights)
        given = {name: value for name, value in inputs.items() if name not in _NO_MODEL_INPUT}
        logits = model(**given, use_cache=False, example_weight=weights).logits
        if fused:
            with torch.no_grad():
                references = _reference(trainer, inputs, pairs)
            outputs = _fused_outputs(logits, inputs, trainer.use_weighting)
        else:
            references, outputs = {}, {"logits": logits}
        by_pair = {name: _pairs(value, pairs) for name, value in outputs.items()}
        rows = {
            name: _pairs(value, pairs)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name not in ("example_weight", "example_ids")
        }
        found = []
        with _alone(trainer, precomputed=fused):
            for i in range(pairs):
                own = {name: value[i][:1] if name in _OF_PAIRS else value[i] for name, value in rows.items()}
                own |= {name: value[i : i + 1] for name, value in references.items()}
                out = SimpleNamespace(**{name: value[i] for name, value in by_pair.items()})
                found.append(owner.compute_loss(trainer, _Returns(out), own).reshape(()))  # type: ignore[attr-defined]  # a Trainer
        return clipped_loss(trainer.accelerator.unwrap_model(model), torch.stack(found), weights)

    return loss


class _Returns:
    """In the place of the model: returns the outputs of one pair."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def __call__(self, **inputs: Any) -> Any:
        return self._out


def _pairs(rows: Tensor, pairs: int) -> tuple[Tensor, ...]:
    """``[2 B, ...]``, chosen rows first, as B of ``[2, ...]``."""
    return rows.view(2, pairs, *rows.shape[1:]).transpose(0, 1).unbind(0)


def _reference(trainer: Any, inputs: dict[str, Any], pairs: int) -> dict[str, Tensor]:
    """``[B]`` log-probabilities of the reference model, where the batch has none."""
    if trainer.precompute_ref_logps:
        return {}
    given = {k: v for k, v in inputs.items() if k not in ("example_weight", "example_ids")}
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, given)
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _fused_outputs(logits: Tensor, inputs: dict[str, Any], weighted: bool) -> dict[str, Tensor]:
    """What TRL's fused head returns, ``[R, T - 1]`` each; what feeds its metrics alone is 0: they are not logged."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:].to(logits.device)
    mask = labels != -100
    log_p = torch.log_softmax(logits[:, -labels.shape[1] - 1 : -1].float(), dim=-1)
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nothing = torch.zeros_like(chosen)
    sizes = {"log_sum_sq_probs": (2 * log_p.detach()).logsumexp(-1)} if weighted else {}
    return {
        **sizes,
        "log_probs": torch.where(mask, chosen, 0.0),
        "label_mask": mask,
        "is_top1": nothing.bool(),
        "entropy": nothing.detach(),
        "mean_logits": nothing.detach(),
    }


@contextmanager
def _alone(trainer: Any, precomputed: bool) -> Iterator[None]:
    """While TRL's function runs for one pair: no collectives, no metrics; the reference is in the batch."""
    names = ("accelerator", "_metrics", "_total_train_tokens", "precompute_ref_logps")
    before = {name: trainer.__dict__[name] for name in names if name in trainer.__dict__}
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.accelerator = _Apart(before["accelerator"])
    if precomputed:
        trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.__dict__.update(before)


class _Apart:
    """An Accelerator whose gathers are of this process: ranks may have different numbers of pairs."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        return tensor

    def gather_for_metrics(self, tensor: Any, **kwargs: Any) -> Any:
        return tensor
