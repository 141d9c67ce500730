"""``prepare``: one call that makes an Accelerate training loop private."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpft.clipping.state import Clipping, ClipState, Isolation
from dpft.clipping.strategy_choice import Choice, Strategy, allowance, choose_for_all, free_memory
from dpft.engines.agreement import dataset_mark, described, mark, versions, weights
from dpft.engines.correlated import correlated_noise, sums_device_of
from dpft.engines.engine import SENDS_AT_ONCE, Kind, launch
from dpft.engines.host import check_sums_device
from dpft.engines.ranks import Ranks
from dpft.engines.requirements import check_accelerator, check_model, check_prepared, watch
from dpft.engines.sequence import SequenceGroup, check_spread, sequence_size
from dpft.engines.settings import check_batches, check_clipping, check_whole
from dpft.engines.shared_account import SharedAccount
from dpft.engines.shared_ledger import SharedLedger, open_ledger
from dpft.errors import PrivacyConfigError
from dpft.loader import PrivateDataLoader, check_dataset
from dpft.noise import GaussianNoise
from dpft.optimizer import DPOptimizer, Noise
from dpft.planning.hardware import measure
from dpft.planning.plan import plan as predict
from dpft.planning.result import Plan
from dpft.privacy.account.payer import Payer
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.samplers.sampler import Lengths, PhysicalBatchSampler, checked_lengths, draw_seed, make_sampler
from dpft.run import LoopGuard, PrivacyRun, check_optimizer
from dpft.users import check_forwards, most_rows, of_users
from dpft.wrap import get_state, unwrap, wrap


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    privacy: PrivacyConfig,
    *,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    max_physical_batch_size: int | Literal["auto"] = 1,
    seq_len: int | None = None,
    clipping: Clipping = "flash",
    strategy: Strategy | Literal["auto"] = "auto",
    memory: int | None = None,
    loss_chunk: int | Literal["auto"] | None = "auto",
    ledger_path: str | os.PathLike[str] | None = None,
    continue_ledger: bool = False,
    num_workers: int = 0,
    lengths: Lengths | None = None,
    static_shapes: bool = False,
    isolation: Isolation = "default",
    sums_device: Literal["cpu"] | None = None,
    account: Payer | str | os.PathLike[str] | None = None,
    test_seed: int | None = None,
) -> tuple[nn.Module, Any, PrivateDataLoader]:
    """Make a training loop private.

    ::

        model, optimizer, loader = dpft.prepare(accelerator, model, optimizer, dataset, privacy, collate_fn=collate)
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    Do not call ``accelerator.clip_grad_norm_`` in the loop: each example is clipped already, and clipping their sum
    before noise is added only weakens the signal. Do not prepare model, optimiser or loader a second time.

    Args:
        accelerator: an ``accelerate.Accelerator`` that has prepared nothing of this training yet.
        model: a causal LM, or another module (then use :func:`dpft.clipped_loss` in the loop).
        optimizer: any torch optimiser on the model's trainable parameters.
        dataset: anything with ``len`` and indexing; one item is one privacy unit's example. Not a DataLoader. Of
            :func:`dpft.by_user`: the unit is the user. Where items are random, ranks compare those of ``undrawn``, if
            there is such an attribute.
        privacy: everything that affects the privacy guarantee.
        collate_fn: list of items -> dictionary of tensors with one row per item (of users: one for each of their
            rows). None: torch's default.
        max_physical_batch_size: maximum number of rows per forward pass; does not change the result. ``"auto"`` takes
            the one that :func:`dpft.plan` predicts to be fastest per example in the free memory.
        seq_len: tokens of the longest example, for ``"auto"``.
        clipping: as :func:`dpft.wrap`; ``"none"`` needs ``noise_multiplier=0`` and is NOT private.
        strategy: as :func:`dpft.wrap`.
        memory: as :func:`dpft.wrap`.
        loss_chunk: as :func:`dpft.wrap`.
        ledger_path: file of the ledger; None: ``privacy_ledger.jsonl`` in the accelerator's project directory, or in
            the current one.
        continue_ledger: continue the count of a ledger that has releases, with a new model.
        num_workers: worker processes of the DataLoader.
        lengths: of the examples, such as their numbers of tokens: whole numbers >= 0, one for each. Each rank then
            sorts its part of a logical batch by them, longest first, before it is cut into physical batches: less
            padding, and the most memory in the first one. Which examples are drawn, the clipped sum (up to the order
            of its terms), noise and accounting stay the same. They are private data and stay on this machine.
        static_shapes: pad every physical batch to ``max_physical_batch_size`` rows.
        isolation: as :func:`dpft.wrap`; the report says where it is ``"off"``.
        sums_device: ``"cpu"`` keeps the clipped sums and the optimiser in host memory, with float32 masters of the
            parameters; one process only. None: in ``.grad``, on the model's device.
        account: the :class:`dpft.Account` (or its file) of the records in ``dataset``: all planned releases are
            reserved there before the first one, or the run is refused. ``loader.privacy.close()`` frees what was not
            used. An account for users takes a dataset of users, or one whose ``privacy_unit`` is ``"user"``.
        test_seed: fixes sampling and noise, for tests only: the run is then not private, and the report says so.

    Returns:
        The model (wrapped in place, prepared), the optimiser (a :class:`DPOptimizer` inside Accelerate's), the loader.

    Raises:
        PrivacyConfigError: a parameter out of range, ``lengths`` of other examples, or a dataset without length and
            indexing.
        EngineError: an Accelerate configuration that would void the guarantee.
        UnsupportedModuleError: see :func:`dpft.wrap`.
        LedgerError: the ledger is locked, damaged, or of another mechanism; the account is damaged or an old copy.
        BudgetExceededError: the planned releases do not fit into the account.
        AccountingError: no theorem composes them with what the account counts.
        MissingPackageError: see :meth:`PrivacyConfig.resolve`; or a sampler with epochs is resumed, whose
            rest follows from the budget.
    """
    ranks = Ranks(accelerator.device)

    def check() -> Kind:
        kind = check_accelerator(accelerator)
        check_model(accelerator, kind, model, optimizer)
        check_dataset(dataset)
        check_sums_device(sums_device, kind, clipping, optimizer)
        check_batches(max_physical_batch_size, clipping, strategy, seq_len)
        if test_seed is not None:
            check_whole("test_seed", test_seed, 0)
            if account is not None:
                raise PrivacyConfigError(
                    "test_seed with an account: a run whose noise is known is not private, and no account can pay for "
                    "it; leave one of them out."
                )
        check_clipping(privacy, kind, sequence_size(accelerator), clipping, strategy, max_physical_batch_size)
        return kind

    kind = ranks.together(check)
    unnamed, of_rows = privacy, collate_fn
    privacy, collate_fn, compared = ranks.together(
        lambda: of_users(dataset, unnamed, of_rows, sequence_size(accelerator))
    )
    sizes = ranks.together(lambda: None if lengths is None else checked_lengths(lengths, len(dataset)))
    key = ranks.from_first(os.urandom(16))
    ranks.agree(
        {
            **privacy.to_dict(),
            "clipping": clipping,
            "strategy": strategy,
            "memory": memory,
            "loss_chunk": loss_chunk,
            "max_physical_batch_size": max_physical_batch_size,
            "seq_len": seq_len,
            "static_shapes": static_shapes,
            "isolation": isolation,
            "sums_device": sums_device,
            "num_workers": num_workers,
            "continue_ledger": continue_ledger,
            "test_seed": test_seed,
            "pays from an account": account is not None,
            "number of examples": len(dataset),
            "order of the examples": ranks.together(lambda: dataset_mark(compared, key)) if ranks.world > 1 else "",
            # the ranks of one sequence must have the same example in each physical batch
            "lengths": None if sizes is None else mark(key, sizes.tobytes()),
            "parameters": described(model),
            "weights": weights(accelerator, model) if kind == "fsdp2" else None,
            **versions(),
        },
        "the setting",
    )
    schedule = ranks.together(lambda: privacy.resolve(len(dataset)))
    # Made only where all ranks have passed the checks, as it makes process groups.
    sequence = SequenceGroup(ranks, size) if (size := sequence_size(accelerator)) != 1 else None
    if max_physical_batch_size == "auto" and sequence is not None:
        max_physical_batch_size = 1
    if max_physical_batch_size == "auto":
        check_whole("seq_len", seq_len, 1)
        assert seq_len is not None
        largest = math.ceil(schedule.expected_batch_size / ranks.world)  # more would be padding
        on_host = sums_device == "cpu"
        planned = ranks.together(
            lambda: _planned_batch(model, optimizer, seq_len, kind, ranks, loss_chunk, on_host, privacy)
        )
        fitting = max(1, planned.batch_size // most_rows(dataset))
        max_physical_batch_size = int(ranks.minimum(min(fitting, largest)))
        memory = planned.allowance if memory is None else memory  # so that the strategy is the planned one
    wrap(
        model,
        clipping=clipping,
        max_grad_norm=schedule.max_grad_norm,
        strategy=strategy,
        clip_function=privacy.clip_function,
        clip_gamma=privacy.clip_gamma,
        memory=memory,
        loss_chunk=loss_chunk,
        isolation=isolation,
        clip_groups=privacy.clip_groups,
    )
    state = get_state(model)
    if state.one_by_one is not None:
        max_physical_batch_size = 1  # with a graph of one example, as their forwards are separate anyway
        warnings.warn(
            f"one example at a time, in physical batches of one: {state.one_by_one}. strategy='per_example' takes "
            "max_physical_batch_size, and keeps the graphs of as many examples",
            stacklevel=2,
        )
    ledger: SharedLedger | None = None
    run: PrivacyRun | None = None
    try:
        ranks.together(lambda: check_optimizer(optimizer.param_groups, get_state(model)))
        ranks.together(lambda: check_forwards(dataset, state.strategy, kind in SENDS_AT_ONCE))
        path = Path(ledger_path or Path(accelerator.project_dir or ".") / "privacy_ledger.jsonl")
        payer = None if account is None else SharedAccount(ranks, account)
        payer_id = None if payer is None else payer.account_id
        seeded, checked = test_seed is not None, isolation != "off"
        ledger = SharedLedger(ranks, lambda: open_ledger(path, privacy, schedule, clipping, seeded, payer_id, checked))
        item: Any = getattr(dataset, "privacy_unit", "example")
        run = PrivacyRun(schedule, ledger, clipping, seeded, continue_ledger, checked, payer, item)
        return _assemble(
            accelerator,
            kind,
            ranks,
            model,
            optimizer,
            run,
            sequence=sequence,
            on_host=sums_device == "cpu",
            noise=_noise(run, ranks, accelerator, kind, (model, optimizer), sums_device, compared, test_seed),
            batches=PhysicalBatchSampler(
                make_sampler(
                    schedule,
                    len(dataset),
                    # the ranks of one sequence draw the same examples
                    rank=ranks.rank if sequence is None else sequence.data_rank,
                    world_size=ranks.world if sequence is None else sequence.data_world,
                    shared_seed=ranks.from_first(draw_seed()),
                    first_step=run.steps,
                    test_seed=test_seed,
                ),
                max_physical_batch_size,
                num_steps=run.last_step,
                first_step=lambda: run.steps,
                agree=ranks.maximum,
                lengths=sizes,
            ),
            loader={
                "dataset": dataset,
                "collate_fn": collate_fn,
                "num_workers": num_workers,
                # each example gathers or sends separately: all ranks must have the same number of rows
                "static_shapes": static_shapes or (kind in SENDS_AT_ONCE and state.strategy == "per_example"),
            },
        )
    except BaseException:
        # Restore the model, so that the caller can fix the problem and call again.
        if run is not None:
            run.close()
        elif ledger is not None:
            ledger.close()
        unwrap(model)
        raise


def _assemble(
    accelerator: Any,
    kind: Kind,
    ranks: Ranks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: PrivacyRun,
    *,
    sequence: SequenceGroup | None,
    on_host: bool,
    noise: Noise,
    batches: PhysicalBatchSampler,
    loader: dict[str, Any],
) -> tuple[nn.Module, Any, PrivateDataLoader]:
    """Engine, optimiser and loader around a wrapped model, watched by one :class:`LoopGuard`."""
    state, schedule = get_state(model), run.schedule
    guard = LoopGuard(accelerator, model, state, run, ranks)
    private_loader = PrivateDataLoader(
        batches=batches,
        device=accelerator.device,
        on_start=guard.start,
        on_batch=guard.next_batch,
        privacy=run,
        **loader,
    )

    def make(cls: type[DPOptimizer], inner: torch.optim.Optimizer, sums: Any) -> DPOptimizer:
        return cls(
            inner,
            sums=sums,
            noise_multiplier=schedule.sum_noise_multiplier,
            max_grad_norm=schedule.max_grad_norm,
            expected_batch_size=schedule.expected_batch_size,
            noise=noise,
            is_last=lambda: private_loader.is_last,
            on_release=guard.release,
            check=guard.check,
        )

    if kind == "single" and not on_host:
        prepared = accelerator.prepare_model(model)
        bare = accelerator.unwrap_model(prepared)
        private = make(DPOptimizer, optimizer, None)
        stepped = accelerator.prepare_optimizer(private)
    else:
        prepared, bare, engine, private, stepped = launch(
            accelerator, kind, model, optimizer, ranks, batches.max_physical_batch_size, make, sequence
        )
        ranks.together(lambda: check_prepared(accelerator, kind, prepared))
        engine.still = watch(kind, prepared, private.inner)
        state.engine = engine
        if sequence is not None:
            state.decided = Choice(
                "one_pass", f"one_pass: the tokens of an example are spread over {sequence.size} ranks"
            )
        elif state.strategy == "auto" and kind != "single":
            state.decided = _agreed_strategy(state, kind, ranks, engine.max_batch_size)
    guard.model = bare
    state.parameters = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    guard.optimizer = private
    if sequence is not None:
        check_spread(sequence, bare)
    run.on_load = guard.start
    accelerator.register_for_checkpointing(run)
    return prepared, stepped, private_loader


def _planned_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seq_len: int,
    kind: Kind,
    ranks: Ranks,
    loss_chunk: Any,
    on_host: bool,
    privacy: PrivacyConfig,
) -> Plan:
    """The plan of the physical batch with the least predicted time per example that fits where training will run.

    Raises:
        UnsupportedModuleError: a model that cannot be planned; give a number then.
    """
    stateless = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
    # With sums and optimiser in host memory the plan has one gradient too many on the device: on the safe side.
    states: Literal["adamw", "sgd"] = "sgd" if stateless or on_host else "adamw"
    there = [p for p in model.parameters() if p.device.type == ranks.device.type]  # the others still have to be moved
    memory = free_memory(ranks.device) + sum(p.numel() * p.element_size() for p in there)
    return predict(
        model,
        "auto",
        seq_len,
        engine=kind,
        world_size=ranks.world,
        optimizer=states,
        loss_chunk=loss_chunk,
        hardware=measure(ranks.device),
        memory=memory,
        clip_groups=privacy.clip_groups,
        privacy=privacy,
    )


def _agreed_strategy(state: ClipState, kind: Kind, ranks: Ranks, max_batch_size: int) -> Choice:
    itemsize = max(p.element_size() for p in state.parameters.values())
    return choose_for_all(
        state.uses,
        max_batch_size,
        itemsize,
        ranks.minimum(allowance(state.memory, ranks.device)),
        shards_gradients=kind in ("fsdp2", "zero2", "zero3"),
        gathers=kind in ("fsdp2", "zero3"),
    )


def _noise(
    run: PrivacyRun,
    ranks: Ranks,
    accelerator: Any,
    kind: Kind,
    trained: tuple[Any, Any],
    sums: Any,
    data: Any,
    seed: Any,
) -> Noise:
    # With the count, so that a resumed test does not repeat the noise of the run that it resumes.
    secret = None if seed is None else seed.to_bytes(16, "big", signed=True) + run.steps.to_bytes(8, "big")
    if (strategy := run.schedule.strategy) is None:
        return GaussianNoise(secret=secret, stream=ranks.rank, secure=run.schedule.secure_rng)
    engine, device = f"{kind} {sums or ''}".strip(), sums_device_of(accelerator, kind, sums)
    return correlated_noise(strategy, ranks, run.ledger, *trained, engine, device, data, secret)
