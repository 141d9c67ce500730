"""Direct preference optimisation: the loss of each pair, the start model's log-probabilities, and the measures.

A pair is one example, and its loss depends on its two rows alone: nothing is normalised by a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelerate import Accelerator
from finetune.data.documents import IGNORED_LABEL
from finetune.data.preferences import PairCollate
from finetune.evaluation import over_batches

LOSSES = ("sigmoid", "ipo")
SORTED_AT_ONCE = 1024  # pairs in memory at once, of data that may exceed it
_INPUTS = ("input_ids", "attention_mask", "example_ids", "example_weight")


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of each pair.

    Attributes:
        kind: ``sigmoid``, DPO (arXiv 2305.18290, eq. 7); ``ipo`` (arXiv 2310.12036, eq. 17) with log-ratios divided by
            the completion's tokens, as TRL does after asking the authors.
        beta: of DPO; tau of IPO.
        label_smoothing: of ``sigmoid``: the share of pairs that are thought to be the wrong way round (conservative
            DPO, Mitchell 2023); in [0, 0.5).
        sft_weight: weight of the negative log-likelihood of the chosen completion, a mean over its tokens (RPO,
            arXiv 2404.19733, eq. 1).
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __call__(self, logps_U2: Tensor, reference_U2: Tensor, tokens_U2: Tensor) -> Tensor:
        """Losses of U pairs; the second dimension is chosen, rejected.

        Args:
            logps_U2: log-probabilities of the completions in nats, summed over their tokens.
            reference_U2: the same of the start model.
            tokens_U2: number of tokens of each.

        Returns:
            ``[U]``, each of a pair alone.
        """
        ratios, counts = logps_U2 - reference_U2, tokens_U2.clamp(min=1)
        if self.kind == "ipo":
            chosen, rejected = (ratios / counts).unbind(1)
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        else:
            logits = self.beta * (ratios[:, 0] - ratios[:, 1])
            right, wrong = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
            losses = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        return losses - self.sft_weight * logps_U2[:, 0] / counts[:, 0] if self.sft_weight else losses


def completion_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each row's labels, summed, in nats.

    Args:
        logits: ``[R, T, V]``.
        labels: ``[R, T]`` int64, not shifted; -100 where there is none.

    Returns:
        ``[R]`` float32 or wider, and the number of labels ``[R]`` int64.
    """
    targets = labels[:, 1:]
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    nll = nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED_LABEL, reduction="none")
    return -nll.sum(1), (targets != IGNORED_LABEL).sum(1)


def pair_losses(model: Callable[..., Any], batch: dict[str, Tensor], loss: PreferenceLoss) -> Tensor:
    """``[U]`` losses of a batch of :class:`PairCollate`, with their graph; in one forward of all rows."""
    logits = model(**{name: batch[name] for name in _INPUTS if name in batch}).logits
    logps, tokens = completion_logps(logits, batch["labels"])
    return loss(logps.view(-1, 2), batch["reference"].view(-1, 2), tokens.view(-1, 2))


def pair_logps(
    model: nn.Module, pairs: Sequence[Any], collate: PairCollate, accelerator: Accelerator | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions, by ``place``. A collective: every rank runs as many forwards.

    Args:
        model: a causal language model, wrapped or not; its training mode is restored.
        pairs: N examples of :func:`finetune.data.preferences.tokenise_pairs`, with the places 0 to N - 1.
        collate: makes batches of them.
        accelerator: shares the batches between ranks.

    Returns:
        ``[N, 2]`` float32 sums in nats, and ``[N, 2]`` numbers of tokens, on the CPU; the same on every rank.
    """

    def of_batch(network: Any, batch: dict[str, Tensor]) -> list[tuple[int, list[list[float]]]]:
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        both = torch.stack(completion_logps(logits, batch["labels"]), dim=-1)
        return list(zip(batch["places"][::2].tolist(), both.view(-1, 2, 2).tolist(), strict=True))

    found = torch.zeros(len(pairs), 2, 2)
    for start in range(0, len(pairs), SORTED_AT_ONCE):
        some = [pairs[i] for i in range(start, min(start + SORTED_AT_ONCE, len(pairs)))]
        for place, values in over_batches(model, some, collate, accelerator, of_batch):
            found[place] = torch.tensor(values)
    return found[..., 0], found[..., 1]


def measures(
    model: nn.Module,
    pairs: Sequence[Any],
    collate: PairCollate,
    loss: PreferenceLoss,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """What a model makes of pairs, given the start model's log-probabilities in ``collate``. A collective.

    Returns:
        ``loss``; ``accuracy``, the share of pairs whose margin is above 0 (a margin of exactly 0 counts as half, so
        that the start model has 0.5); ``margin``, the mean of beta times the chosen completion's log-ratio to the
        start model less the rejected one's, as TRL's rewards/margins; ``likelier``, the share of pairs whose chosen
        completion has the larger log-probability, which the start model need not be known for.
    """
    assert collate.reference is not None, "the reference comes first"
    logps, tokens = pair_logps(model, pairs, collate, accelerator)
    ratios = logps - collate.reference
    margins, difference = ratios[:, 0] - ratios[:, 1], logps[:, 0] - logps[:, 1]
    return {
        "loss": loss(logps, collate.reference, tokens).mean().item(),
        "accuracy": _above(margins),
        "margin": loss.beta * margins.mean().item(),
        "likelier": _above(difference),
    }


def _above(values: Tensor) -> float:
    """Share above 0; a 0 counts as half."""
    return ((values > 0).float() + 0.5 * (values == 0).float()).mean().item()


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn dropout off, in place: log-probabilities are compared with those of a model that has none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # to mypy it would be a tensor or a module
    return model
