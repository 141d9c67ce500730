"""Does many wrong things on two ranks, each in a training of its own, and writes what every rank saw of each.

refusals_worker.py OUT [disagree]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpft
from dpft.engines import agreement
from tests import zoo
from tests.engines.on_cpu import make_accelerator
from tests.training import collate, config, examples

ACCELERATOR = make_accelerator()
RANK = ACCELERATOR.process_index
KIND = ACCELERATOR.distributed_type.value
ENGINE = f"zero{ACCELERATOR.state.deepspeed_plugin.zero_stage}" if KIND == "DEEPSPEED" else KIND
OUT = Path(sys.argv[1])
SEEN: dict[str, Any] = {}


class Private:
    """A training that has been prepared, and what its parameters were."""

    def __init__(self, name: str, model: nn.Module | None = None, **options: Any) -> None:
        options = {"max_physical_batch_size": 4, "test_seed": 3, "dataset": examples(), **options}
        model = zoo.seeded(zoo.frozen_embedding)() if model is None else model
        make = options.pop("make", lambda ps: torch.optim.SGD(ps, lr=1.0, weight_decay=0.5))
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        changes, options["collate_fn"] = options.pop("changes", {}), collate
        if options.pop("reset", True) and ENGINE.startswith("zero"):
            ACCELERATOR.deepspeed_engine_wrapped = None  # or backward would go on to the engine of the case before
        options["ledger_path"] = OUT.with_name(f"{name}.jsonl".replace(" ", "_"))
        self.model, self.optimizer, self.loader = dpft.prepare(
            ACCELERATOR, model, optimizer, options.pop("dataset"), config(**changes), **options
        )
        self.bare = ACCELERATOR.unwrap_model(self.model)
        self.engine = self.bare._dpft_state.engine
        self.parameters = dict(self.engine.sums.parameters)
        self.before = self.local()

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The innermost optimiser."""
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, dpft.DPOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.inner

    def local(self) -> list[torch.Tensor]:
        """This rank's part of every trainable parameter, and DeepSpeed's float32 copies of them."""
        parts: list[Any] = [getattr(p, "ds_tensor", p) for p in self.parameters.values()]
        parts += getattr(getattr(self.engine.sums, "layout", None), "flats", [])
        return [(part.to_local() if hasattr(part, "to_local") else part).detach().clone() for part in parts]

    def loop(self, before_forward: Any = None, before_step: Any = None, losses: Any = None) -> None:
        """One logical batch."""
        for batch in self.loader:
            if before_forward is not None:
                before_forward(self)
            loss = self.model(**batch).loss if losses is None else losses(self.model, batch)
            if before_step is not None:
                before_step(self)
            ACCELERATOR.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.loader.is_last:
                break


def case(name: str, act: Callable[[], Any]) -> None:
    """Runs it, and notes the error; ``moved`` and ``steps`` where the error's training is known."""
    began, error, training = time.monotonic(), None, None
    try:
        training = act()
        if isinstance(training, tuple):
            training, run = training
            run()
    except Exception as raised:
        error = raised
    note: dict[str, Any] = {"error": type(error).__name__ if error is not None else None, "says": str(error)}
    note["refused"] = isinstance(error, dpft.DPFTError)
    if isinstance(training, Private):
        note["moved"] = any(
            not torch.equal(after, before) for after, before in zip(training.local(), training.before, strict=True)
        )
        note["steps"] = training.loader.privacy.steps
        training.loader.privacy.close()
        training.engine.sums.discard()  # as a new loop would: what was on its way when the error came
    note["seconds"] = round(time.monotonic() - began, 2)
    SEEN[name] = note


def disagreements() -> None:
    """On rank 1 another value than on rank 0."""
    data = examples()
    other: dict[str, dict[str, Any]] = {
        "noise": {"changes": {"noise_multiplier": 0.5}},
        "epsilon": {"changes": {"noise_multiplier": None, "target_epsilon": 8.0 if RANK else 4.0}},
        "clip norm": {"changes": {"max_grad_norm": 2.0}},
        "batch size": {"changes": {"expected_batch_size": 7}},
        "steps": {"changes": {"num_steps": 4}},
        "delta": {"changes": {"target_delta": 1e-4}},
        "clip function": {"changes": {"clip_function": "automatic"}},
        "clipping": {"clipping": "ghost"},
        "strategy": {"strategy": "two_pass"},
        "physical": {"max_physical_batch_size": 3},
        "length": {"dataset": data[:-1]},
        "order": {"dataset": data[1:] + data[:1]},
        "users": {"dataset": dpft.by_user(data, [(i + RANK) % 5 for i in range(len(data))], rows=1)},
        "reduction of users": {"dataset": dpft.by_user(data, range(12), rows=1, reduce="sum" if RANK else "mean")},
        "lengths": {"lengths": range(len(data))},
        "other lengths": {"lengths": [RANK] * len(data)},
        "seed": {"test_seed": 4},
        "workers": {"num_workers": 1},
        "trainable": {"model": zoo.seeded(zoo.llama)("sdpa") if RANK else None},
        "invalid": {"max_physical_batch_size": 0},
        "data loader": {"dataset": torch.utils.data.DataLoader(data)},  # type: ignore[arg-type]  # a list is a dataset
        "fp16": {"model": zoo.seeded(zoo.llama)("sdpa").half() if RANK else None},
    }
    for name, options in other.items():
        always = name in ("epsilon", "other lengths", "users", "reduction of users")
        case(name, lambda name=name, o=options if RANK or always else {}: Private(name, **o))  # type: ignore[misc]  # bound now
    plain = agreement.versions
    real: Any = dpft.prepare.__globals__
    real["versions"] = lambda: {**plain(), "version of torch": "1.0"} if RANK else plain()
    case("version", lambda: Private("version"))
    real["versions"] = plain

    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    case("batch norm", lambda: Private("batch norm", norm))
    case("no clipping", lambda: Private("no clipping", clipping="none", changes={"noise_multiplier": 0.0}))
    stranger = nn.Parameter(torch.zeros(7, 3))
    case("foreign", lambda: Private("foreign", make=lambda ps: torch.optim.SGD([*ps, stranger], lr=1.0)))

    def on_one_rank() -> tuple[Private, Any]:
        training = Private("on_one_rank")
        return training, lambda: training.loop(before_step=unfreeze if RANK else None)

    case("unfrozen on one rank", on_one_rank)


def unfreeze(training: Private) -> None:
    training.bare.get_input_embeddings().weight.requires_grad_(True)


def replace(training: Private) -> None:
    head = training.bare.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())


def add(training: Private) -> None:
    training.bare.register_parameter("more", nn.Parameter(torch.ones(3)))


def swap(training: Private) -> None:
    zero = getattr(training.model, "optimizer", None)
    groups = [{**group, "params": list(group["params"])} for group in training.inner.param_groups]
    zero.optimizer = torch.optim.SGD([g for g in groups if g["params"]] or [torch.zeros(1)], lr=1.0, weight_decay=0.5)


def drop_hooks(training: Private) -> None:
    training.inner._optimizer_step_pre_hooks.clear()


def drop_hooks_unseen(training: Private) -> None:
    """The last line of defence by itself: as if nothing had looked before the step."""
    training.engine.still = lambda: None
    drop_hooks(training)
    for group in training.inner.param_groups:
        group["weight_decay"] = 0.0  # DeepSpeed does step then, on a gradient of zeros


def skip_one(training: Private) -> None:
    """A parameter that gets no noise."""
    sums = training.engine.sums
    release, parameters = sums.release, sums.parameters

    def skipping(*args: Any) -> None:
        if hasattr(sums, "_buckets"):
            sums._buckets[0] = sums._buckets[0][1:]
        sums.parameters = dict(list(parameters.items())[1:])
        try:
            release(*args)
        finally:
            sums.parameters = parameters

    sums.release = skipping


def more_groups(training: Private) -> None:
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


class UnsavedDropout(nn.Module):
    """Recomputes with another dropout mask than its forward drew."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return checkpoint(lambda h: self.b(self.drop(h)), self.a(x), use_reentrant=False, preserve_rng_state=False)


def retried(training: Private) -> None:
    """Memory runs out between the release and the step; the loop catches it and runs the batch again."""
    sums = training.engine.sums
    give = sums.flat_gradient

    def fail(number: int) -> Any:
        sums.flat_gradient = give
        raise torch.OutOfMemoryError("simulated")

    sums.flat_gradient = fail
    for batch in training.loader:
        try:
            ACCELERATOR.backward(training.model(**batch).loss)
        except torch.OutOfMemoryError:
            ACCELERATOR.backward(training.model(**batch).loss)
        training.optimizer.step()


def fewer(training: Private) -> None:
    """One rank leaves a layer out."""
    training.bare.config.num_hidden_layers -= RANK
    training.loop()


def changes() -> None:
    """After `prepare`, something is not what it was."""

    def started(name: str, when: str, act: Any) -> tuple[Private, Any]:
        training = Private(name)
        return training, lambda: training.loop(**{when: act})

    acts = [unfreeze, replace, add, drop_hooks, skip_one, more_groups]
    acts += [swap, drop_hooks_unseen] if ENGINE.startswith("zero") else []
    case("nothing wrong", lambda: started("nothing_wrong", "before_step", None))
    for act in acts:
        for when in ("before_forward", "before_step"):
            if when == "before_forward" and act not in (unfreeze, replace, add):
                continue
            if when == "before_step" and act is replace and ENGINE == "FSDP":
                continue  # FSDP2 puts its own parameter back before the backward has ended: nothing is wrong then
            name = f"{act.__name__} {when}"
            case(name, lambda name=name, when=when, act=act: started(name, when, act))  # type: ignore[misc]  # bound now

    def unsaved() -> tuple[Private, Any]:
        model: Any = zoo.seeded(zoo.llama)("sdpa")
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
        training = Private("unsaved", model, strategy="two_pass")
        return training, training.loop

    case("random state not saved", unsaved)

    def mixed() -> tuple[Private, Any]:
        model: Any = zoo.seeded(zoo.llama)("sdpa")
        layer = model.get_submodule("model.layers.0")
        layer.register_forward_hook(lambda module, args, h: h - h.mean(0, keepdim=True).detach())
        training = Private("mixed", model)
        return training, training.loop

    case("rows mixed by detached values", mixed)

    def differs() -> tuple[Private, Any]:
        torch.manual_seed(3)
        if ENGINE == "FSDP":
            ACCELERATOR.state.fsdp_plugin.auto_wrap_policy = None  # this model has no decoder layers
        data = [{"x": torch.ones(1, 8)} for _ in range(4)]
        training = Private(
            "differs",
            UnsavedDropout(),
            dataset=data,
            strategy="two_pass",
            max_physical_batch_size=4,
            changes={"expected_batch_size": 4, "num_steps": 20},
        )

        def losses(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            torch.manual_seed(5)  # the same masks on all ranks, so that all of them see it at once
            return dpft.clipped_loss(model, model(**batch).sum((1, 2)) * 100, batch["example_weight"])

        return training, lambda: training.loop(losses=losses)

    case("random states differ", differs)
    if ENGINE.startswith("zero"):
        case("retried release", lambda: (training := Private("retried"), lambda: retried(training)))
    if ENGINE == "zero2":
        case("layers of one rank", lambda: (run := Private("layers", strategy="two_pass"), lambda: fewer(run)))
    if ENGINE.startswith("zero"):
        # Accelerate's backward would go to the first engine, which would step; this one never.
        case("a second training", lambda: Private("second", reset=False))


if "disagree" in sys.argv:
    disagreements()
changes()
OUT.with_name(f"{OUT.name}.{RANK}").write_text(json.dumps(SEEN))
ACCELERATOR.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # the engines that were left half-way have threads that C++ does not like to find at its own end
