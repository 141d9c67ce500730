"""Five trainers with one interface, each as a user of its library writes it: plain, three of Opacus, and dpft's.

All train ``model`` on ``input_ids [B, T]`` that are their own labels, an example being a row, its loss the mean over
its tokens. The private ones clip each row's gradient at the same norm, add the same noise, divide by ``rows`` and step
AdamW with the same settings. Opacus refuses tied weights, and is imported where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpft

Clipping = Literal["flash", "ghost", "fast", "per_sample", "none"]
Strategy = Literal["one_pass", "two_pass", "per_example", "auto"]


class Trainer:
    """One training step, in the four calls of a training loop.

    Args:
        model: a causal LM of transformers, in training mode; it is changed.
        rows: B, of every batch, and the batch size that noisy sums are divided by.
        learning_rate: AdamW's.
        noise_multiplier: sigma, without a unit; 0 is NOT private.
        max_grad_norm: C, the clip norm.
        made: called with ``"module"``, then ``"optimizer"``, when there is one.

    Attributes:
        name: its class's name, a key of :data:`TRAINERS`.
        module: what is called in the place of the model: what the library returned.
        model: the model itself.
        optimizer: what ``step`` and ``zero_grad`` are called on.
        reentrant: gradient checkpointing must be of the reentrant kind.
    """

    reentrant = False

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        learning_rate: float = 1e-4,
        noise_multiplier: float = 1.0,
        max_grad_norm: float = 1.0,
        made: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = type(self).__name__
        self.model = model
        self.rows = rows
        self.learning_rate = learning_rate
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.module: Any = self.wrap(model)
        made("module")
        self.optimizer: torch.optim.Optimizer = self.make_optimizer()
        made("optimizer")

    def wrap(self, model: Any) -> Any:
        """What is to be called in the place of the model."""
        return model

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW on what is to be trained."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate)

    def forward(self, ids: Tensor) -> Any:
        """``input_ids [B, T]``, int64 -> the mean loss, something with ``backward()``."""
        return self.module(input_ids=ids, labels=ids).loss

    def backward(self, loss: Any) -> None:
        """Leave in the model what ``step`` uses."""
        loss.backward()

    def step(self) -> None:
        """Update the parameters."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Let go of the gradients, in the way that is the library's default."""
        self.optimizer.zero_grad()

    def train_step(self, ids: Tensor) -> None:
        """The four in order."""
        self.backward(self.forward(ids))
        self.step()
        self.zero_grad()


class StandardTrainer(Trainer):
    """Plain training: no clipping and no noise."""


class OpacusTrainer(Trainer):
    """What the three of Opacus share: ``PrivacyEngine.make_private`` over a loader of one batch, and the model's call.

    It makes the module and the optimiser in one. The loader is not sampled from, since every trainer is given its
    batches; it tells Opacus the batch size.
    """

    reentrant = True
    private_optimizer: torch.optim.Optimizer

    def make_private(self, module: nn.Module, **options: Any) -> Any:
        """Opacus' tuple: module, optimiser, for ghost clipping the criterion, and the loader."""
        from opacus import PrivacyEngine

        loader = DataLoader(TensorDataset(torch.zeros(self.rows, 1)), batch_size=self.rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Secure RNG turned off")
            engine = PrivacyEngine()
        return engine.make_private(
            module=module,
            optimizer=super().make_optimizer(),
            data_loader=loader,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            poisson_sampling=False,
            **options,
        )

    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.private_optimizer

    def positions(self, ids: Tensor) -> dict[str, Tensor]:
        """GPT-2's position ids, one row an example: Opacus needs each row's own, and GPT-2 makes one row for all."""
        if self.model.config.model_type != "gpt2":
            return {}
        # Not a view: ghost clipping flattens them.
        return {"position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)}


class DPSGDTrainer(OpacusTrainer):
    """Opacus' per-example gradients, by hooks: all of them are held until the optimiser clips and sums them."""

    def wrap(self, model: Any) -> Any:
        module, self.private_optimizer, _ = self.make_private(model, grad_sample_mode="hooks")
        return module

    def forward(self, ids: Tensor) -> Tensor:
        """The model's own loss: the mean over all tokens, and so of the rows' means, their lengths being equal."""
        loss: Tensor = self.module(input_ids=ids, labels=ids, **self.positions(ids)).loss
        return loss


class DPGhostClippingTrainer(OpacusTrainer):
    """Opacus' ghost clipping: norms in a first backward, the clipped sum in a second."""

    def wrap(self, model: Any) -> Any:
        module, self.private_optimizer, self.criterion, _ = self.make_private(
            self.prepare(model), grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss()
        )
        return module

    def prepare(self, model: nn.Module) -> nn.Module:
        """What ``make_private`` is given."""
        return model

    def forward(self, ids: Tensor) -> Any:
        """Opacus' loss, whose ``backward()`` runs both backwards."""
        logits = self.module(input_ids=ids, **self.positions(ids)).logits[:, :-1].float()
        return self.criterion(logits.flatten(0, 1), ids[:, 1:].flatten(), shape=logits.shape)


class DPFastGradientClippingTrainer(DPGhostClippingTrainer):
    """Opacus' fast gradient clipping: norms of one layer's per-example gradients at a time, else as ghost clipping."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrapped already: ``make_private`` has no option for it, and takes such a module as it is."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        return GradSampleModuleFastGradientClipping(
            model, max_grad_norm=self.max_grad_norm, use_ghost_clipping=False, loss_reduction="mean"
        )


class DPFlashClippingTrainer(Trainer):
    """dpft.

    Args:
        clipping, strategy, loss_chunk: of :func:`dpft.wrap`.
    """

    def __init__(
        self,
        model: Any,
        *,
        clipping: Clipping = "flash",
        strategy: Strategy = "auto",
        loss_chunk: int | Literal["auto"] | None = "auto",
        **options: Any,
    ) -> None:
        self.clipping, self.strategy, self.loss_chunk = clipping, strategy, loss_chunk
        super().__init__(model, **options)

    def wrap(self, model: Any) -> Any:
        return dpft.wrap(
            model,
            clipping=self.clipping,
            max_grad_norm=self.max_grad_norm,
            strategy=self.strategy,
            loss_chunk=self.loss_chunk,
        )

    def make_optimizer(self) -> torch.optim.Optimizer:
        inner = super().make_optimizer()
        return dpft.DPOptimizer(inner, self.noise_multiplier, self.max_grad_norm, self.rows)


TRAINERS: dict[str, type[Trainer]] = {
    trainer.__name__: trainer
    for trainer in (
        StandardTrainer,
        DPSGDTrainer,
        DPGhostClippingTrainer,
        DPFastGradientClippingTrainer,
        DPFlashClippingTrainer,
    )
}
