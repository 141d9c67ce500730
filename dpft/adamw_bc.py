"""AdamW whose second moment is corrected for the variance of the privacy noise (DP-AdamBC).

The gradient that Adam gets is ``g + w``: the clipped sum over b, and noise of a known variance Phi = (sigma C / b)^2.
So its second moment estimates ``E[g^2] + Phi``, and where Phi is the larger part, as it mostly is, every parameter is
divided by the same number: Adam is SGD with momentum. Tang, Shpilevskiy, Lecuyer 2023 (arXiv 2312.14334, AAAI 2024)
subtract Phi, with a floor gamma', which everything below it is raised to. Here ``gamma' = floor Phi``: a floor in
units of Phi has the same meaning at every clip norm, batch and epsilon. It must be well above what the average leaves
of the noise, whose standard deviation is ``sqrt(2 (1 - beta2) / (1 + beta2)) Phi``: 0.23 Phi for beta2 = 0.95.

Each step subtracts the variance of its own noise before it is averaged: where that changes (an adaptive clip norm,
correlated noise, which has a smaller variance in the first steps), the average of the variances is subtracted,
weighted as the squares are. Of correlated noise only the variance is subtracted: the gradient depends on earlier
noise, and what the two have in common is not known.

The variance is a constant of the mechanism: the step is a function of releases, and costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dpft.errors import WrapError


class AdamWBC(torch.optim.Optimizer):
    """``theta -= lr (m / sqrt(max(v - Phi, floor Phi)) + weight_decay theta)``, with the usual averages m and v.

    To be passed to :func:`dpft.prepare` (one process, DDP or FSDP2) or :class:`dpft.DPOptimizer`, which tells it Phi
    at every release. Without noise it is AdamW. With a floor of 1 an element with little but noise is stepped on as by
    AdamW, whose learning rate is a good one to begin with; a lower floor lets it step further, by up to
    ``1 / sqrt(floor)``, and needs a smaller rate.

    Args:
        params: float32 or float64 parameters, or groups of them.
        lr: learning rate.
        betas: of the averages of gradients and of squares.
        eps: added to the root.
        weight_decay: decoupled, as AdamW's.
        floor: the least that is left of the second moment, in units of Phi, > 0.

    Raises:
        ValueError: a value out of range, or a parameter of fewer than 32 bits, in which Phi could not be subtracted.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        floor: float = 1.0,
    ) -> None:
        self.noise_variance: float | None = None  # Phi of the step that follows; told anew for each
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "floor": floor})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; checks the group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"AdamWBC: {name}={group[name]!r}; expected a finite number >= 0.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamWBC: betas={group['betas']!r}; expected two numbers in [0, 1).")
        if not 0 < group["floor"] < math.inf:
            raise ValueError(f"AdamWBC: floor={group['floor']!r}; expected a finite number > 0.")
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"AdamWBC: a parameter of shape {list(p.shape)} is {p.dtype}, in which the second moment would be "
                    "rounded by more than the correction; expected float32. Train float32 parameters, or use AdamW."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One step on the gradients, whose noise has the variance that was told since the last step.

        Raises:
            WrapError: none was told.
        """
        phi, self.noise_variance = self.noise_variance, None
        if phi is None or closure is not None:
            raise WrapError(
                "AdamWBC does not know the variance of the noise in the gradient; expected a step() by DPOptimizer, "
                "without a closure. Pass it to dpft.prepare or DPOptimizer; without privacy use AdamW."
            )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group, phi)

    def _step(self, p: Tensor, group: dict[str, Any], phi: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        assert p.grad is not None
        # every operation is of single elements, so that it is the same on a shard
        weight, grad, mean, square = map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        (beta1, beta2), step, lr = group["betas"], float(state["step"]), float(group["lr"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sub_((1 - beta2) * phi)
        root = square.div(1 - beta2**step).clamp_min_(group["floor"] * phi).sqrt_().add_(group["eps"])
        weight.mul_(1 - lr * group["weight_decay"])
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))


def local(tensor: Any) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
