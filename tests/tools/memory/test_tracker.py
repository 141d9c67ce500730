"""The tracker of tools/profile_memory.py and its parts: allocator, saved tensors, replay."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tools.memory.measured import (
    MIB,
    PARAMETERS,
    TINY,
)
from tools.memory.allocator import Allocator, CpuAllocator
from tools.memory.components import TRACKED
from tools.memory.events import Event, Kind, Owners, Role, Storage
from tools.memory.profile_fields import Profile, Readings
from tools.memory.replay import Replay, Shares, replay
from tools.memory.setup import EXPERIMENTS, make_batch, make_model
from tools.memory.tracker import Tracker


def follow(
    allocator: Allocator, run: Any, marks: tuple[str, str] = ("0_model_loaded", "1_wrapped_with_dp")
) -> Profile:
    """What a tracker and an allocator say of a function between two marks."""
    readings = Readings(allocator, simulate=False)
    tracker = Tracker("cpu", Owners(lambda: [], lambda: []), {}, allocator, readings.take)
    with allocator.running(), tracker:
        tracker.mark(marks[0])
        run()
        tracker.mark(marks[1])
    return Profile(tracker, readings)


def test_what_an_operation_takes_inside_itself_is_a_temporary_matrix() -> None:
    """A CPU's `add_` of another dtype converts its operand first, which no operation returns."""

    def run() -> None:
        torch.zeros(1000, 500).add_(torch.ones(1000, 500, dtype=torch.bfloat16))

    profile = follow(CpuAllocator(), run)
    (peak,) = [p for p in profile.peaks if p.name == "wrap"]
    assert peak.inside == 1000 * 500 * 4
    assert peak.operator == "add_.Tensor"
    components = peak.components()
    assert components["temp_matrices_mb"] * MIB == 1000 * 500 * (4 + 2 + 4)
    assert components["unattributed_mb"] == 0


def test_the_picture_over_time_has_what_an_operation_takes_inside_itself() -> None:
    def run() -> None:
        kept = torch.zeros(1000, 500)
        kept.add_(torch.ones(1000, 500, dtype=torch.bfloat16))
        kept.exp()

    profile = follow(CpuAllocator(), run, ("iter0_before_forward", "iter0_after_forward"))
    (peak,) = profile.peaks[:1]
    timeline = profile.timeline_fields(0)
    assert timeline is not None and peak.inside == 1000 * 500 * 4
    points = timeline["points"]
    assert max(sum(point[1:]) for point in points) * MIB == peak.total == 1000 * 500 * (4 + 2 + 4)
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    assert points[-1][1:] == drawn(profile.timeline.end)


def drawn(instant: Any) -> list[float]:
    return [instant.components[name] / MIB for name in TRACKED]


def test_the_allocators_height_is_that_of_the_largest_moment() -> None:
    def run() -> None:
        one = torch.empty(1 << 18)
        two = torch.empty(1 << 18)
        del one
        three = torch.empty(1 << 16)
        del two, three

    profile = follow(CpuAllocator(), run)
    (peak,) = [p for p in profile.peaks if p.name == "wrap"]
    assert (peak.total, peak.inside, peak.instant.total) == (1 << 21, 0, 1 << 21)
    assert profile.snapshots()[-1]["allocated_mb"] == 0


class _Raises(torch.utils._python_dispatch.TorchDispatchMode):
    """Below the tracker: an operation takes memory, then fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sin.default:
            torch.empty(1 << 20)
            raise RuntimeError("planted")
        return func(*args, **(kwargs or {}))


def test_an_operation_that_failed_and_was_caught_is_counted() -> None:
    def run() -> None:
        x = torch.ones(8)
        with contextlib.suppress(RuntimeError):
            torch.sin(x)
        torch.exp(x)

    with _Raises():
        profile = follow(CpuAllocator(), run)
    (peak,) = [p for p in profile.peaks if p.name == "wrap"]
    assert (peak.operator, peak.inside) == ("sin.default", 1 << 22)


def test_a_saved_tensor_that_was_changed_in_place_is_refused_as_ever() -> None:
    def run() -> None:
        y = torch.ones(3, requires_grad=True).exp()
        total = y.sum()
        y.add_(1)
        (total + y.sum()).backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*shape \[3\].*expected version 0"):
        follow(CpuAllocator(), run)


def test_a_storage_counts_once_whatever_views_there_are() -> None:
    held: list[Tensor] = []

    def run() -> None:
        base = torch.empty(1 << 18)
        held.extend([base, base.view(2, -1), base[10:], base.t()])

    profile = follow(CpuAllocator(), run)
    assert profile.snapshots()[-1]["allocated_mb"] == 1
    assert profile.timeline.end.total == MIB


def played(*steps: tuple[Kind, int, Role | None], becomes: Role | None = None) -> list[dict[str, int]]:
    """Components after each event of storages of 10, 100, ... bytes, without those of 0."""
    storages = [Storage(10 ** (i + 1), (), "", "", "", False, becomes if i == 0 else None) for i in range(3)]
    state, found = Replay(storages), []
    for kind, index, role in steps:
        state.apply(Event(0, kind, index, role))
        found.append({name: size for name, size in state.components.items() if size})
    return found


def test_components_follow_the_holders() -> None:
    birth, hold, drop, mark, death = Kind.BIRTH, Kind.HOLD, Kind.DROP, Kind.MARK, Kind.DEATH
    assert played(
        (birth, 0, None),
        (hold, 0, Role.SAVED),
        (hold, 0, Role.SAVED),
        (drop, 0, Role.SAVED),
        (hold, 0, Role.KEPT),  # autograd holds it too: an activation, until it lets go of it
        (drop, 0, Role.SAVED),
        (drop, 0, Role.KEPT),
        (birth, 1, None),
        (mark, 0, None),
        (death, 0, None),
    ) == [
        {"temp_matrices": 10},
        *[{"activation_hooks": 10}] * 4,
        {"book_keeping": 10},
        {"temp_matrices": 10},
        {"temp_matrices": 110},
        {"other": 110},
        {"other": 100},
    ]
    assert played((birth, 0, None), becomes=Role.GRADIENT) == [{"gradients": 10}]


def test_a_rank_holds_its_share() -> None:
    shares = Shares({"gradients": 0.25}, {"optimizer_states": 7}, {"gradients": 3})
    components = dict.fromkeys(TRACKED, 0) | {"gradients": 10, "optimizer_states": 100, "other": 5}
    assert {k: v for k, v in shares.of(components).items() if v} == {"gradients": 6, "optimizer_states": 7, "other": 5}
    assert shares.of(dict.fromkeys(TRACKED, 0))["optimizer_states"] == 0


def test_an_operation_that_fails_is_remembered() -> None:
    layer = nn.Linear(4, 4)
    tracker = Tracker("cpu", Owners(lambda: [], lambda: []), {id(layer): "the.layer"}, Allocator())
    with tracker, pytest.raises(RuntimeError):
        tracker.mark("0_model_loaded")
        held = torch.empty(1 << 18)
        layer(torch.ones(3, 5))
    del held
    assert tracker.failed is not None
    assert tracker.failed.module == "the.layer"
    assert replay(tracker, count=tracker.failed.events).end.total == MIB + 4 * (3 * 5 + 4 * 4)  # held, x, the weight


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Opacus leaves cycles, which die when they are found."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "flash_clip", "opacus_ghost"])
def test_the_tracker_changes_nothing(name: str, checkpointing: bool) -> None:
    """The allocator's peak of a step, and what the step leaves in the parameters, with it and without it."""
    setup = replace(TINY, gradient_checkpointing=checkpointing, batch_size=2)
    peaks, left = [], []
    for tracked in (False, True):
        model = make_model(setup, EXPERIMENTS[name])
        trainer = EXPERIMENTS[name].trainer(model, setup, lambda _: None)
        if name != "vanilla":
            trainer.optimizer.noise_multiplier = 0.0  # type: ignore[attr-defined]  # both libraries' optimisers have it
        ids = make_batch(setup, model)
        for _ in range(2):
            trainer.train_step(ids)
        allocator = CpuAllocator()
        tracker = Tracker("cpu", Owners(lambda: [], lambda: []), {}, allocator, allocator.mark)
        with allocator.running(), tracker if tracked else contextlib.nullcontext():
            mark: Any = functools.partial(tracker.mark, "x") if tracked else allocator.mark
            mark()
            trainer.train_step(ids)
            mark()
        # But for numbers, of 8 bytes each: how many of Opacus' are alive at the peak changes from run to run.
        events = allocator._profile.kineto_results.events()
        events = [event for event in events if event.name() != "[memory]" or abs(event.nbytes()) > 8]
        allocator._profile = SimpleNamespace(kineto_results=SimpleNamespace(events=functools.partial(list, events)))
        allocator.finish(0)
        height = allocator.readings[0].height
        assert height is not None
        peaks.append(height.total)
        left.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert peaks[0] == peaks[1] > 4 * PARAMETERS
    assert torch.equal(*left)
