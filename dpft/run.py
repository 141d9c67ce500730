"""A private training run: the budget it has spent, and checks that its loop does what the accountant assumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dpft.clipping.factors import ClipCount
from dpft.clipping.state import ClipState
from dpft.engines.ranks import Ranks
from dpft.engines.shared_account import SharedAccount
from dpft.engines.shared_ledger import SharedLedger
from dpft.errors import BudgetExceededError, ClippingError, LedgerError, WrapError
from dpft.optimizer import DPOptimizer
from dpft.privacy import privacy_report
from dpft.privacy.accounting.calibration import max_steps_within
from dpft.privacy.accounting.epsilon_meter import EpsilonMeter
from dpft.privacy.mechanism import EPOCH_SAMPLERS, UnitName
from dpft.privacy.report import NOT_ISOLATED, PAID_FROM
from dpft.privacy.schedule import PrivacySchedule
from dpft.scalar_noise import GridGaussian


class PrivacyRun:
    """The privacy budget of a run, spent and remaining: schedule, ledger, epsilon; in ``accelerator.save_state``.

    Attributes:
        schedule: the resolved configuration.
        ledger: of the releases, each recorded before it is made.
        clipping: the clipping mode; ``"none"`` is not private.
        seeded: a noise or sampling seed was given: for tests, not private.
        last_step: number of the release after which the budget is spent.
    """

    def __init__(
        self,
        schedule: PrivacySchedule,
        ledger: SharedLedger,
        clipping: str,
        seeded: bool,
        continued: bool,
        isolated: bool = True,
        account: SharedAccount | None = None,
        item: UnitName = "example",
    ) -> None:
        self._isolated = isolated
        self._account = account
        self._account_id = None if account is None else account.account_id
        self.schedule, self.ledger, self.clipping, self.seeded = schedule, ledger, clipping, seeded
        self._meter: EpsilonMeter | None = None
        self._loaded = False
        self._unclaimed = ledger.count > 0 and not continued
        self._history, self._first = ledger.events(), ledger.count
        self.on_load: Callable[[], None] = lambda: None
        self.last_step = self._last_step()
        if account is not None:
            planned = (schedule.mechanism, self.last_step - self._first)
            account.reserve(ledger.run_id, self._history, planned, ledger.path, item)

    def _last_step(self) -> int:
        """The schedule's number of steps, or fewer where a restart spends more (by a new epoch)."""
        schedule, left = self.schedule, max(0, self.schedule.num_steps - self._first)
        if self._history and schedule.sampler in EPOCH_SAMPLERS and self.private:
            left = max_steps_within(
                schedule.mechanism,
                schedule.epsilon,
                schedule.target_delta,
                accountant=schedule.accountant,
                history=self._history,
                limit=left,
            )
        return self._first + left

    @property
    def private(self) -> bool:
        """Whether the releases have a finite epsilon.

        Raises:
            MissingPackageError: this is unknown, because the accountant's packages are not installed.
        """
        return self.clipping != "none" and not self.seeded and self.schedule.private

    @property
    def clip_norm(self) -> float:
        """C of the next release: the schedule's, or, where it adapts, what follows from the releases in the ledger."""
        norm = None if self.schedule.adaptive_clip is None else self.ledger.clip_norm_after(self.ledger.count)
        return self.schedule.max_grad_norm if norm is None else norm

    @property
    def steps(self) -> int:
        """Releases so far, according to the ledger."""
        return self.ledger.count

    def epsilon(self, exact: bool = False) -> float:
        """Epsilon spent so far, at the schedule's delta; inf where the run is not private.

        Args:
            exact: False gives a cheap upper bound for a progress bar: :meth:`dpft.privacy.EpsilonMeter.at`.

        Raises:
            MissingPackageError: the accountant's packages are not installed.
        """
        if not self.private:
            return float("inf")
        if self._meter is None:
            schedule, horizon = self.schedule, max(1, self.last_step - self._first)
            self._meter = EpsilonMeter(
                schedule.mechanism,
                schedule.target_delta,
                horizon,
                accountant=schedule.accountant,
                history=self._history,
            )
        here = self.steps - self._first
        return self._meter.exact(here) if exact else self._meter.at(here)

    def check_start(self) -> None:
        """Refuse a loop that would train nothing, and leave an untrained model to be saved as a trained one.

        Raises:
            LedgerError: the ledger is full with the releases of a run that was not resumed.
            BudgetExceededError: it was to be continued, and nothing is left.
        """
        if self.ledger.count >= self.last_step and self.ledger.count == self._first and not self._loaded:
            self.check_budget()

    def check_budget(self) -> None:
        """Refuse a release that the budget does not cover.

        Raises:
            BudgetExceededError: the schedule's steps are used up.
            LedgerError: the ledger belongs to a run that was not resumed.
        """
        if self._unclaimed:
            raise LedgerError(
                f"the ledger {self.ledger.path} has {self.ledger.count} releases of an earlier run. Resume that "
                "run with accelerator.load_state(...) before training; or pass continue_ledger=True to start "
                "with a new model and keep counting; or give a new run another ledger_path."
            )
        if self.ledger.count >= self.last_step:
            planned = self.schedule.computed_epsilon
            raise BudgetExceededError(
                f"{self.ledger.count} of {self.last_step} planned releases are spent; one more would exceed "
                + ("the number of steps" if planned is None else f"epsilon {planned:.4g}")
                + ". The parameters were not changed. Plan a larger budget for a new run."
            )

    def report(self, tuning: str | None = None, notes: tuple[str, ...] = ()) -> dict[str, Any]:
        """The privacy report, for a model card; ``tuning`` and ``notes`` as :func:`dpft.privacy_report`."""
        if not self._isolated:
            notes = (*notes, NOT_ISOLATED)
        if self._account_id is not None:
            notes = (*notes, PAID_FROM.format(account=self._account_id))
        return privacy_report(
            self.schedule,
            self.ledger.content(),
            clipping=self.clipping,
            noise_seed_known=self.seeded,
            sampling_seed_known=self.seeded,
            tuning=tuning,
            notes=notes,
        )

    def close(self) -> None:
        """End the run: free what it did not use of its account; close the ledger, so that another run can open it.

        Raises:
            LedgerError: the account could not be written: what the run did not use stays reserved.
        """
        account, self._account = self._account, None
        try:
            if account is not None:
                account.finish(self.ledger.run_id, self.ledger.path)
        finally:
            self.ledger.close()

    def state_dict(self) -> dict[str, Any]:
        """The run id of the ledger that this checkpoint belongs to, its count, and an adapted clip norm; no secret."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint. The ledger's count remains valid, even where the checkpoint is behind it.

        Raises:
            LedgerError: the checkpoint belongs to another ledger, or is ahead of this one.
        """
        self.ledger.check_resume(state)
        self._unclaimed, self._loaded = False, True
        self.on_load()


class LoopGuard:
    """Checks what the accountant assumes about the user's training loop.

    One clipped backward per physical batch, of the covered parameters, with an unscaled loss; one release per logical
    batch that was drawn; nothing of an abandoned batch in the next one.
    """

    def __init__(self, accelerator: Any, model: nn.Module, state: ClipState, run: PrivacyRun, ranks: Ranks) -> None:
        self._accelerator, self.model, self._state, self._run = accelerator, model, state, run
        self._ranks = ranks
        self._backwards = state.backwards
        state.deferred_checks.deferred = True
        self.optimizer: DPOptimizer | None = None
        self._step: int | None = None
        self._rows = self._padding = 0
        self._drawn = False
        self._count_noise: GridGaussian | None = None

    def start(self) -> None:
        """Called when a loop begins."""
        self._ranks.together(self._run.check_start)
        self._ranks.agree({"releases": self._run.steps}, "the ledger's")
        self._state.broken = False
        self._state.deferred_checks.clear()
        self._backwards = self._state.backwards
        self._step, self._drawn = None, False

    def next_batch(self, step: int, is_last: bool, rows: int, padding: int) -> None:
        """Called before the loader yields a physical batch."""
        self._count()
        self._rows, self._padding = rows, padding
        self._state.weights = None
        if step != self._step:
            if self._drawn and self._step is not None:
                raise ClippingError(
                    f"logical batch {self._step} ended without optimizer.step(): its sum would be released with the "
                    "next one's, under the noise of one. Call optimizer.step() after every backward."
                )
            self._step, self._drawn = step, True
            assert self.optimizer is not None
            # What an abandoned loop left, whose examples would be in two batches; or an old release, if zero_grad was
            # called when Accelerate skips it.
            self.optimizer.discard()
            self._begin_count()
        self._backwards = self._state.backwards
        self._accelerator.sync_gradients = is_last

    def _count(self) -> None:
        ran = self._state.backwards - self._backwards
        if ran > 1:
            raise ClippingError(
                f"{ran} backward passes ran on one physical batch; expected one. Each adds a contribution of "
                "norm C per example. Add up the per-example losses and call dpft.clipped_loss once."
            )
        if ran and self._state.last is not None and len(self._state.last.example_weights) > self._rows:
            raise ClippingError(
                f"{len(self._state.last.example_weights)} losses were clipped of a physical batch of {self._rows} "
                "rows: an example that has several contributes C for each. Add an example's losses up first."
            )
        if ran and self._padding and self._state.last is not None:
            counted = (self._state.last.example_weights > 0).sum()
            self._state.deferred_checks.refuse_if(
                counted > self._rows - self._padding,
                "more rows of a physical batch had a weight above zero than examples were drawn: the loader's "
                "example_weight was not passed on. Call model(**batch), or dpft.clipped_loss(model, losses, "
                "batch['example_weight']).",
            )

    def release(self) -> None:
        """Record one release before it is made, if the budget covers it and a batch was drawn for it."""
        self._run.check_budget()
        if not self._drawn:
            raise ClippingError(
                "optimizer.step() would release a logical batch a second time; the accountant composes batches "
                "that are drawn independently. Step once per batch that the loader yields."
            )
        self._run.ledger.record(self._next_clip_norm())
        self._drawn = False

    def _begin_count(self) -> None:
        """Clip, and scale the noise of, the logical batch that begins by the current clip norm, where it adapts.

        It stays the same until the release: every example in the sum is clipped to the C of its noise.
        """
        if self._run.schedule.adaptive_clip is None:
            return
        assert self.optimizer is not None
        norm = self._run.clip_norm
        self._state.rule = dataclasses.replace(self._state.rule, max_grad_norm=norm)
        self.optimizer.max_grad_norm = norm
        self._state.count = ClipCount()

    def _next_clip_norm(self) -> float | None:
        """Release the noised count of this logical batch, as the clip norm of the next; None where it is constant.

        The exact count is summed over the ranks, and rank 0 adds the noise, once. The ledger's line of the release is
        the first to have it, so that a count never leaves uncounted.
        """
        schedule, optimizer = self._run.schedule, self.optimizer
        if schedule.adaptive_clip is None:
            return None
        assert optimizer is not None and schedule.count_noise is not None and self._state.count is not None
        assert optimizer.max_grad_norm == self._state.rule.max_grad_norm == self._run.clip_norm
        total = self._ranks.total(self._state.count.take())  # of +1 and -1, which are whole
        if getattr(optimizer.noise, "known_secret", False):  # for tests: not private
            noised = float(optimizer.noise.add_(torch.tensor([total / 2], dtype=torch.float64), schedule.count_noise))
        else:
            # One example changes the count by a half, the total by 1.
            grid = self._count_noise = self._count_noise or GridGaussian(2 * schedule.count_noise)
            noised = grid.noised(int(total) * grid.steps) / 2
        norm = schedule.adaptive_clip.next_clip_norm(self._run.clip_norm, noised, schedule.expected_batch_size)
        return self._ranks.from_first(norm)

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Called before a release; raises on all ranks or on none."""
        self._ranks.together(lambda: self._check(parameters))

    def _check(self, parameters: Iterable[nn.Parameter]) -> None:
        state = self._state
        state.check_parameters(self.model, at_rest=True)
        if state.broken:
            raise ClippingError(
                "a backward pass of this logical batch failed midway, and the content of .grad is not known. Start a "
                "new iteration over the loader: it drops the batch, of which nothing was released."
            )
        self._count()
        state.deferred_checks.check(1.0)
        _check_covered(parameters, state)
        strays = [name for name, p in state.parameters.items() if p.grad is not None]
        if state.engine is not None and strays:
            raise WrapError(
                f"{strays[:3]} of {len(strays)} parameters have a gradient that is not the clipped sum, which is kept "
                "elsewhere: something besides model(**batch).loss was differentiated, or .grad was written to. It was "
                "not applied."
            )


def check_optimizer(param_groups: Iterable[dict[str, Any]], state: ClipState) -> None:
    """Refuse an optimiser whose trainable parameters are not all clipped."""
    _check_covered([p for group in param_groups for p in group["params"] if p.requires_grad], state)


def _check_covered(parameters: Iterable[nn.Parameter], state: ClipState) -> None:
    covered = {id(p) for p in state.parameters.values()}
    uncovered = [list(p.shape) for p in parameters if id(p) not in covered]
    if uncovered:
        raise WrapError(
            f"the optimiser has {len(uncovered)} trainable parameters that are not the model's (shapes "
            f"{uncovered[:3]}): they are not clipped. Construct the optimiser with model.parameters()."
        )
