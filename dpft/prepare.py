"""``prepare``: one call that makes an Accelerate training loop private."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpft.clipping.planner import Strategy
from dpft.clipping.state import Clipping, ClipState
from dpft.engines.single import check_single_process
from dpft.errors import BudgetExceededError, ClippingError, LedgerError, PrivacyConfigError, WrapError
from dpft.loader import PrivateDataLoader
from dpft.noise import GaussianNoise
from dpft.optimizer import DPOptimizer
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.ledger import Ledger
from dpft.privacy.meter import EpsilonMeter
from dpft.privacy.plan import PrivacyPlan
from dpft.privacy.report import privacy_report
from dpft.privacy.sampler import PhysicalBatchSampler, make_sampler
from dpft.wrap import get_state, wrap


class PrivacyRun:
    """What a private training has spent and may spend: plan, ledger, epsilon. Saved with ``accelerator.save_state``.

    Attributes:
        plan: the resolved configuration.
        ledger: of releases, written ahead.
        clipping: the clipping mode; ``"none"`` is not private.
        seeded: a noise or sampling seed was given: for tests, not private.
    """

    def __init__(self, plan: PrivacyPlan, ledger: Ledger, clipping: str, seeded: bool, continued: bool) -> None:
        self.plan, self.ledger, self.clipping, self.seeded = plan, ledger, clipping, seeded
        self._meter: EpsilonMeter | None = None
        self._unclaimed = ledger.count > 0 and not continued

    @property
    def private(self) -> bool:
        """Whether the releases have a finite epsilon."""
        return self.plan.private and self.clipping != "none" and not self.seeded

    @property
    def steps(self) -> int:
        """Releases so far, by the ledger."""
        return self.ledger.count

    def epsilon(self, exact: bool = False) -> float:
        """Epsilon spent so far, at the plan's delta; inf where the run is not private.

        Args:
            exact: False gives a cheap upper bound for a progress bar, at most some per cent above.
        """
        if not self.private:
            return float("inf")
        if self._meter is None:
            self._meter = self.plan.meter()
        return self._meter.exact(self.steps) if exact else self._meter.at(self.steps)

    def release(self) -> None:
        """Write one release ahead. Called by the optimiser before any parameter changes.

        Raises:
            BudgetExceededError: the plan's steps are used up.
            LedgerError: the ledger cannot be written, or belongs to a run that was not resumed.
        """
        if self._unclaimed:
            raise LedgerError(
                f"the ledger {self.ledger.path} has {self.ledger.count} releases of an earlier run. Resume that "
                "run with accelerator.load_state(...) before training; or pass continue_ledger=True to start "
                "the model anew and keep counting; or give a new run another ledger_path."
            )
        if self.ledger.count >= self.plan.num_steps:
            raise BudgetExceededError(
                f"{self.ledger.count} of {self.plan.num_steps} planned releases are spent; one more would "
                f"exceed epsilon {self.plan.epsilon:.4g}. The parameters were not changed. Plan a larger budget "
                "for a new run."
            )
        self.ledger.record()

    def report(self, tuning: str | None = None, notes: tuple[str, ...] = ()) -> dict[str, Any]:
        """The privacy report, for a model card; ``tuning`` and ``notes`` as :func:`dpft.privacy_report`."""
        return privacy_report(
            self.plan,
            self.ledger,
            clipping=self.clipping,
            noise_seed_known=self.seeded,
            sampling_seed_known=self.seeded,
            tuning=tuning,
            notes=notes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Which ledger this checkpoint belongs to, and its count. No secret."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a checkpoint: the ledger's count stands, also where the checkpoint is behind it.

        Raises:
            LedgerError: the checkpoint belongs to another ledger, or is ahead of this one.
        """
        self.ledger.check_resume(state)
        self._unclaimed = False


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    privacy: PrivacyConfig,
    *,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    max_physical_batch_size: int = 1,
    clipping: Clipping = "flash",
    strategy: Strategy | Literal["auto"] = "auto",
    memory: int | None = None,
    ledger_path: str | os.PathLike[str] | None = None,
    continue_ledger: bool = False,
    num_workers: int = 0,
    static_shapes: bool = False,
    test_seed: int | None = None,
) -> tuple[nn.Module, Any, PrivateDataLoader]:
    """Make a training loop private.

    ::

        model, optimizer, loader = dpft.prepare(accelerator, model, optimizer, dataset, privacy, collate_fn=collate)
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        accelerator: an ``accelerate.Accelerator`` on which nothing of this training was prepared yet.
        model: a causal LM, or another module (then use :func:`dpft.clipped_loss` in the loop).
        optimizer: any torch optimiser on the model's trainable parameters.
        dataset: anything with ``len`` and indexing; one item is one privacy unit's example. Not a DataLoader.
        privacy: all that changes the privacy.
        collate_fn: list of items -> dictionary of tensors with one row per item. None: torch's default.
        max_physical_batch_size: most rows that go through the model at once; does not change the result.
        clipping: as :func:`dpft.wrap`; ``"none"`` needs ``noise_multiplier=0`` and is NOT private.
        strategy: as :func:`dpft.wrap`.
        memory: as :func:`dpft.wrap`.
        ledger_path: file of the ledger; None: ``privacy_ledger.jsonl`` in the accelerator's project directory, or
        here. continue_ledger: count on in a ledger that has releases, with a model that starts anew.
        num_workers: worker processes of the DataLoader.
        static_shapes: pad every physical batch to ``max_physical_batch_size`` rows.
        test_seed: fixes sampling and noise, for tests only: with it nothing is private, and the report says so.

    Returns:
        The model (wrapped in place, prepared), the optimiser (a :class:`DPOptimizer` inside Accelerate's), the loader.

    Raises:
        PrivacyConfigError: a parameter out of range, or a dataset without length and indexing.
        EngineError: an Accelerate configuration that would void the guarantee.
        UnsupportedModuleError: see :func:`dpft.wrap`.
        LedgerError: the ledger is locked, damaged, or of another mechanism.
    """
    check_single_process(accelerator)
    _check_dataset(dataset)
    if clipping == "none" and privacy.noise_multiplier != 0:
        raise PrivacyConfigError(
            "clipping='none' bounds nothing, so no noise makes it private; pass noise_multiplier=0 to say that "
            "this run is not private, or choose another clipping."
        )
    if isinstance(max_physical_batch_size, bool) or max_physical_batch_size < 1:
        raise PrivacyConfigError(f"max_physical_batch_size is {max_physical_batch_size!r}; expected a number >= 1")
    plan = privacy.resolve(len(dataset))
    wrap(
        model,
        clipping=clipping,
        max_grad_norm=plan.max_grad_norm,
        strategy=strategy,
        clip_function=privacy.clip_function,
        clip_gamma=privacy.clip_gamma,
        memory=memory,
    )
    state = get_state(model)
    path = Path(ledger_path or Path(accelerator.project_dir or ".") / "privacy_ledger.jsonl")
    run = PrivacyRun(plan, _open_ledger(path, privacy, plan), clipping, test_seed is not None, continue_ledger)
    accelerator.register_for_checkpointing(run)

    model = accelerator.prepare_model(model)
    state.parameters = {name: p for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
    sampler = make_sampler(plan, len(dataset), first_step=run.steps, test_seed=test_seed)
    loader = PrivateDataLoader(
        dataset,
        PhysicalBatchSampler(sampler, max_physical_batch_size, num_steps=plan.num_steps, first_step=lambda: run.steps),
        collate_fn,
        device=accelerator.device,
        num_workers=num_workers,
        static_shapes=static_shapes,
        on_start=lambda: guard.start(private),
        on_batch=lambda is_last: guard.next_batch(is_last),
        privacy=run,
    )
    guard = _Guard(accelerator, accelerator.unwrap_model(model), state)
    private = DPOptimizer(
        optimizer,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
        noise=GaussianNoise(
            secret=None if test_seed is None else _test_secret(test_seed, run), secure=plan.secure_rng
        ),
        is_last=lambda: loader.is_last,
        on_release=run.release,
        check=guard.check,
    )
    guard.check(private.parameters())
    return model, accelerator.prepare_optimizer(private), loader


class _Guard:
    """Between loop and mechanism: one clipped backward per physical batch, of the covered parameters, unscaled."""

    def __init__(self, accelerator: Any, model: nn.Module, state: ClipState) -> None:
        self._accelerator, self._model, self._state = accelerator, model, state
        self._backwards = state.backwards

    def start(self, optimizer: DPOptimizer) -> None:
        """A loop begins: what an abandoned one left in ``.grad`` would put its examples into a second batch."""
        optimizer.discard()
        self._state.broken, self._state.scales = False, None
        self._backwards = self._state.backwards

    def next_batch(self, is_last: bool) -> None:
        """Before a physical batch is handed out."""
        self._count()
        self._backwards = self._state.backwards
        self._accelerator.sync_gradients = is_last

    def _count(self) -> None:
        ran = self._state.backwards - self._backwards
        if ran > 1:
            raise ClippingError(
                f"{ran} backward passes ran on one physical batch; expected one. Each adds a contribution of "
                "norm C per example. Add up the per-example losses and call dpft.clipped_loss once."
            )

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before a release."""
        state = self._state
        state.check_parameters(self._model)
        if state.broken:
            raise ClippingError(
                "a backward pass of this logical batch failed midway, and what it left in .grad is not known. Start "
                "iterating over the loader anew: it drops the batch, of which nothing was released."
            )
        self._count()
        state.check_scales(1.0)
        covered = {id(p) for p in state.parameters.values()}
        strangers = [list(p.shape) for p in parameters if id(p) not in covered]
        if strangers:
            raise WrapError(
                f"the optimiser holds {len(strangers)} trainable parameters that the model does not (shapes "
                f"{strangers[:3]}): they are not clipped. Make the optimiser on model.parameters()."
            )


def _test_secret(seed: int, run: PrivacyRun) -> bytes:
    # The count is in it, so that a resumed test does not repeat the noise of the run that it resumes.
    return seed.to_bytes(16, "big", signed=True) + run.steps.to_bytes(8, "big")


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise PrivacyConfigError(
            "dataset is a DataLoader; expected the dataset itself. Its batches would not be Poisson samples, and the "
            "accountant has no theorem for them."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise PrivacyConfigError(
            f"dataset is a {type(dataset).__name__} without len() or indexing. Poisson sampling needs random "
            "access: load a streaming dataset into a map-style one (datasets.Dataset is memory-mapped and may "
            "exceed memory)."
        )
    if len(dataset) == 0:
        raise PrivacyConfigError("the dataset is empty")


def _open_ledger(path: Path, privacy: PrivacyConfig, plan: PrivacyPlan) -> Ledger:
    content = Ledger.read(path) if path.exists() and path.stat().st_size > 0 else None
    resume = content is not None and content.count > 0
    if content is not None and resume:
        strangers = [mechanism for mechanism, count in content.events if count and mechanism != plan.mechanism]
        if strangers:
            raise LedgerError(
                f"the ledger {path} has releases of another mechanism ({strangers[0]}) than the one planned "
                f"({plan.mechanism}). Resume with the configuration of the run that wrote it, or choose another "
                "ledger_path for a new run."
            )
    return Ledger.open(
        path,
        "resume" if resume else "new",
        mechanism=plan.mechanism,
        config=privacy.to_dict(),
        fingerprint=privacy.fingerprint(),
        plan=plan.to_dict(),
    )
