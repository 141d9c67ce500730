"""Exponential moving average of the trained weights: a function of what was released, which costs no privacy.

It averages the noise of the last steps (De et al. 2022, arXiv 2204.13650, section 3). torch's ``AveragedModel`` copies
a whole model; here the trained parameters alone are kept, in float32, where they are, sharded as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpft.adamw_bc import local
from dpft.errors import EngineError, WrapError
from dpft.optimizer import DPOptimizer


class WeightEMA:
    """The average of the weights after each release; in ``accelerator.save_state``.

    ::

        model, optimizer, loader = dpft.prepare(...)
        ema = dpft.WeightEMA(accelerator, model, optimizer, decay=0.999)
        for batch in loader:
            ...                     # as without: each release updates the average
        with ema.applied():         # the model has the averaged weights
            evaluate(model)
            save(model)

    After release t = 0, 1, ... the average is ``d_t average + (1 - d_t) weights``, with
    ``d_t = min(decay, (1 + t) / (10 + t))``: it begins at the start weights, and forgets them in any number of steps.

    Args:
        accelerator: of the run; nothing may have been loaded with ``load_state`` yet.
        model: from :func:`dpft.prepare`.
        optimizer: from :func:`dpft.prepare`.
        decay: in [0, 1); 0: the last weights.
        warm_up: False: ``d_t = decay`` from the first release on.

    Attributes:
        updates: number of releases that the average has seen.

    Raises:
        ValueError: a decay out of range.
        WrapError: model or optimiser are not those of ``prepare``.
        EngineError: ZeRO-3, whose shards are DeepSpeed's.
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, optimizer: Any, decay: float = 0.9999, warm_up: bool = True
    ) -> None:
        if isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"WeightEMA: decay={decay!r}; expected a number in [0, 1), such as 0.999.")
        private = optimizer if isinstance(optimizer, DPOptimizer) else getattr(optimizer, "optimizer", None)
        self._model: nn.Module = accelerator.unwrap_model(model)
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not isinstance(private, DPOptimizer) or {id(p) for p in trained.values()} != {
            id(p) for p in private.parameters()
        }:
            raise WrapError(
                f"WeightEMA got a {type(optimizer).__name__} and a model whose {len(trained)} trainable parameters "
                "are not the ones that it steps on; expected model and optimizer as dpft.prepare returned them."
            )
        if any(hasattr(p, "ds_tensor") for p in trained.values()):
            raise EngineError(
                "WeightEMA under ZeRO-3: DeepSpeed keeps the shards of the weights to itself. Use FSDP2 or ZeRO-2, or "
                "leave the average out."
            )
        self.decay, self.warm_up, self.updates = float(decay), warm_up, 0
        self._parameters, self._optimizer, self._seen = trained, private, private.releases
        self._averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in trained.items()
        }
        self._kept: dict[str, Tensor] | None = None
        private.followers.append(self)
        accelerator.register_for_checkpointing(self)

    def before_release(self) -> None:
        """Called by the optimiser.

        Raises:
            WrapError: within :meth:`applied`.
        """
        self._refuse_applied("trained")

    @torch.no_grad()
    def after_release(self) -> None:
        """Called by the optimiser, once or more, after each release: average its weights in."""
        if self._optimizer.releases == self._seen:
            return
        self._seen = self._optimizer.releases
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        for name, p in self._parameters.items():
            average = local(self._averages[name])
            average.lerp_(local(p).to(average.dtype), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights: to evaluate, sample, and export.

        Raises:
            WrapError: it is applied already.
        """
        self._refuse_applied("applied again")
        self._kept = {name: local(p.detach()).clone() for name, p in self._parameters.items()}
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(self._kept)
            self._kept = None

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for module in self._model.modules():
            if hasattr(module, "reshard"):  # FSDP2: what an evaluation left gathered is of the other weights
                module.reshard()
        for name, p in self._parameters.items():
            local(p).copy_(local(weights[name]))

    def _refuse_applied(self, act: str) -> None:
        if self._kept is not None:
            raise WrapError(
                f"the model has its averaged weights, of WeightEMA.applied(), and was to be {act}; expected its own "
                "ones. Leave the with-block first."
            )

    def state_dict(self) -> dict[str, Any]:
        """The averages, whole and on the CPU, and their number; what was released determines them. A collective.

        Raises:
            WrapError: within :meth:`applied`, when the checkpoint would have the average as the model's weights.
        """
        self._refuse_applied("saved in a checkpoint")
        return {"updates": self.updates, "averages": {name: _whole(a) for name, a in self._averages.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, also on another number of processes. A collective.

        Raises:
            ValueError: averages of other parameters.
        """
        given, own = state["averages"], self._averages
        if {name: a.shape for name, a in given.items()} != {name: a.shape for name, a in own.items()}:
            raise ValueError(
                f"the checkpoint has averages of {len(given)} parameters, which are not the {len(own)} trained ones "
                "in name or shape. Load the checkpoint of the same model."
            )
        for name, average in own.items():
            local(average).copy_(_shard(given[name], average))
        self.updates, self._seen = int(state["updates"]), self._optimizer.releases


def _whole(tensor: Any) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach().to("cpu", copy=True)
    from torch.distributed.tensor import DTensor

    mesh = tensor.device_mesh
    there = tensor.to_local().to(mesh.device_type)  # where the group sends, if FSDP2 keeps the shard on the CPU
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(there, mesh, tensor.placements, shape=shape, stride=stride).full_tensor().cpu()


def _shard(whole: Tensor, like: Any) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device_mesh.device_type), like.device_mesh, like.placements).to_local()
