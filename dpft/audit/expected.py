"""What a release should consist of: clipped gradients of single examples, by autograd, in float64.

It shares no code with what is audited: no rule, no kernel, no clip factor, and not even the wrapped model. One example
at a time goes through a copy of the model that dpft never saw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpft.privacy import PrivacySchedule

Collate = Callable[[list[Any]], Mapping[str, Any]]


class ExpectedGradients:
    """Clipped gradients of single examples at given parameters.

    Args:
        model: the model before dpft has touched it; it is copied, and the copy is in eval mode.
        dataset: the examples.
        collate: list of items -> dictionary of tensors, as given to ``dpft.prepare``.
        schedule: its clip norm, clip function and gamma.

    Attributes:
        names: of the trainable parameters, in the order in which they are laid out in one vector.
        sizes: elements of each.
        clip_norm: C, to be set where it adapts.
        norm: of the last gradient that was asked for, before it was clipped.
    """

    def __init__(self, model: nn.Module, dataset: Any, collate: Collate, schedule: PrivacySchedule) -> None:
        self._model = copy.deepcopy(model).to("cpu", torch.float64).eval()
        self._dataset, self._collate, self._schedule = dataset, collate, schedule
        self._parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self.names = list(self._parameters)
        self.sizes = [p.numel() for p in self._parameters.values()]
        self.clip_norm, self.norm = schedule.max_grad_norm, 0.0
        self._groups = clipped_apart(self.names, schedule.clip_groups)

    def at(self, parameters: Tensor) -> None:
        """Go to other parameters, float64 ``[d]``."""
        with torch.no_grad():
            for p, value in zip(self._parameters.values(), parameters.split(self.sizes), strict=True):
                p.copy_(value.view_as(p))

    def of(self, index: int) -> Tensor:
        """The clipped gradient of one example, float64 ``[d]``.

        Raises:
            ValueError: the model returns no loss for it.
        """
        batch = self._collate([self._dataset[index]])
        batch = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}
        loss = getattr(self._model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(self._model).__name__} returned no loss for an example; expected a Hugging Face model whose "
                "collated examples have labels. An audit cannot know another loss."
            )
        parts = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True, materialize_grads=True)
        flat = [part.flatten() for part in parts]
        self.norm = float(torch.cat(flat).norm())
        clipped = list(flat)
        for members, share in self._groups:
            factor = self._factor(float(torch.cat([flat[i] for i in members]).norm()), share * self.clip_norm)
            for i in members:
                clipped[i] = flat[i] * factor
        return torch.cat(clipped)

    def _factor(self, norm: float, bound: float) -> float:
        if self._schedule.clip_function == "automatic":
            return bound / (norm + self._schedule.clip_gamma)
        return min(1.0, bound / norm) if norm > 0 else 1.0


def clipped_apart(names: Sequence[str], spec: Any) -> list[tuple[list[int], float]]:
    """Places of the parameters that are clipped together, with their share of the clip norm: squares add up to 1."""
    if spec is None:
        return [(list(range(len(names))), 1.0)]
    if spec == "layer":
        labels = [name.rpartition(".")[0] for name in names]
        weight = dict.fromkeys(labels, 1.0)
    else:
        weight = dict(spec)
        labels = [max((start for start in weight if name.startswith(start)), key=len) for name in names]
    total = sum(value**2 for value in weight.values()) ** 0.5
    return [
        ([i for i, label in enumerate(labels) if label == group], value / total) for group, value in weight.items()
    ]


class WatchedDataset:
    """A dataset that notes which examples were asked for; ``dpft.prepare`` takes it like any other."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._asked: list[int] = []

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        self._asked.append(int(index))
        return self._dataset[index]

    def taken(self) -> list[int]:
        """The examples asked for since the last call, in order."""
        asked, self._asked = self._asked, []
        return asked


@contextmanager
def gathered(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Whole trainable parameters by name on this rank, whatever the engine; a collective where they are sharded."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(p, "ds_id") for p in named.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            yield {name: p.detach() for name, p in named.items()}
    else:
        yield {name: _whole(p.detach()) for name, p in named.items()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parameter_vector(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The trainable parameters, float64 ``[d]`` on the CPU. A collective where they are sharded.

    Raises:
        ValueError: the model has other trainable parameters than ``names``.
    """
    with gathered(model) as found:
        if set(found) != set(names):
            raise ValueError(
                f"trainable parameters differ: {sorted(set(found) ^ set(names))[:3]}; expected {names[:3]}..."
            )
        return torch.cat([found[name].to("cpu", torch.float64).flatten() for name in names])
