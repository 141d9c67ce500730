"""What a memory process answers, against ground truth: closed forms, autograd's own saved tensors, the allocator."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.memory.measured import (
    LAYERS,
    MIB,
    NUMBER_OF_PARAMETERS,
    PARAMETERS,
    TINY,
    TOKENS,
    VOCAB,
    WIDTH,
    at,
    measured,
)
from tools.memory.setup import EXPERIMENTS, make_batch, make_model

EVERY_LIBRARY = ("vanilla", "flash_clip", "ghost", "per_sample", "opacus_ghost")


# One row too where that is another way through the code: of one example, one-pass' gradient is the one of `.grad`.
@pytest.mark.parametrize(("name", "rows"), [*((name, 2) for name in EVERY_LIBRARY), ("vanilla", 1), ("flash_clip", 1)])
def test_parameters_gradients_and_states_to_the_byte(name: str, rows: int) -> None:
    found = measured(name, batch_size=rows)
    assert found["parameters"] == PARAMETERS
    for snapshot in found["snapshots"]:
        assert at(found, snapshot["name"])["model_parameters"] == 4 * PARAMETERS
    states = 2 * 4 * PARAMETERS + 4 * NUMBER_OF_PARAMETERS  # two moments, and a count of steps for each parameter
    left = int(name.startswith("opacus"))  # its zero_grad leaves zeros
    for point, gradients in (("before_forward", left), ("after_backward", 1), ("after_step", 1)):
        held = at(found, f"iter0_{point}")
        assert held["optimizer_states"] == states
        assert held["gradients"] == gradients * 4 * PARAMETERS
    assert at(found, "2_optimizer_created")["optimizer_states"] == 0


def saved_by_autograd(loss: Tensor) -> set[int]:
    """Keys of the storages that the nodes of a graph hold: a walk that fires no hook."""
    found, seen, waiting = set(), set(), deque([loss.grad_fn])
    while waiting:
        node: Any = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(next_node for next_node, _ in node.next_functions)
        for attribute in dir(node):
            if attribute.startswith("_raw_saved_"):
                raw = getattr(node, attribute)
                for saved in raw if isinstance(raw, list | tuple) else [raw]:
                    if isinstance(getattr(saved, "data", None), Tensor):
                        found.add(saved.data.untyped_storage())
    return found


def hooked(forward: Any) -> tuple[Tensor, set[Any]]:
    """A loss, and the storages that hooks on saved tensors saw."""
    found = set()

    def pack(t: Tensor) -> Tensor:
        found.add(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return forward(), found


@pytest.mark.parametrize("name", ["vanilla", "flash_clip"])
def test_saved_activations_are_those_of_autograd(name: str) -> None:
    """By hooks on saved tensors and by a walk of the graph, in a model of its own without a tracker."""
    model = make_model(TINY, EXPERIMENTS[name])
    trainer = EXPERIMENTS[name].trainer(model, TINY, lambda _: None)
    ids = make_batch(TINY, model)
    trainer.train_step(ids)
    excepted = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers(), ids)}

    def total(storages: set[Any]) -> int:
        return sum(s.nbytes() for s in {s._cdata: s for s in storages if s._cdata not in excepted}.values())

    loss, by_hooks = hooked(lambda: trainer.forward(ids))
    held = at(measured(name), "iter0_after_forward")
    if name == "vanilla":
        plain = trainer.forward(ids)
        assert total(saved_by_autograd(plain)) == held["activation_hooks"]
        assert held["book_keeping"] == 0
    head = held["gradients"] + held["book_keeping"]  # dpft's head saves its gradients in the forward
    assert total(by_hooks) == held["activation_hooks"] + head
    assert held["activation_hooks"] > LAYERS * 4 * TOKENS * WIDTH * 4
    del loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "flash_clip", "opacus_ghost", "opacus_per_sample"])
def test_components_and_the_unattributed_are_the_allocators_total(name: str, checkpointing: bool) -> None:
    found = measured(name, batch_size=2, gradient_checkpointing=checkpointing)
    peak = found["breakdown"]["total_allocated_mb"]
    for entry, total in [
        *((s, s["allocated_mb"]) for s in found["snapshots"]),
        *((p, p["peak_mb"]) for p in found["phases"]),
    ]:
        assert sum(entry["components"].values()) == pytest.approx(total, abs=1e-9)
        assert abs(entry["components"]["unattributed_mb"]) <= 0.02 * total, entry
    assert peak == max(p["peak_mb"] for p in found["phases"] if p["name"].startswith("iter"))
    assert found["independent_peak_mb"] >= found["tracked_peak_mb"] > 0.98 * found["independent_peak_mb"]


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    whole, checkpointed = (measured("vanilla", gradient_checkpointing=on) for on in (False, True))
    held = at(checkpointed, "iter0_after_forward")
    assert held["checkpoint_inputs"] == LAYERS * (TOKENS * WIDTH * 4 + torch.get_rng_state().nbytes)
    assert at(whole, "iter0_after_forward")["checkpoint_inputs"] == 0
    assert held["activation_hooks"] < 0.5 * at(whole, "iter0_after_forward")["activation_hooks"]
    (backward,) = [p for p in checkpointed["phases"] if p["name"] == "iter0_backward"]
    assert backward["components"]["activation_hooks_mb"] > 0  # what is recomputed is no temporary matrix


def test_per_example_gradients_are_book_keeping() -> None:
    most = {}
    for name in ("per_sample", "fast"):
        timeline = measured(name, batch_size=2)["timeline"]
        column = 1 + timeline["columns"].index("book_keeping_mb")
        most[name] = max(point[column] for point in timeline["points"]) * MIB
    matrices = PARAMETERS - WIDTH * (1 + 2 * LAYERS)
    assert most["per_sample"] >= 2 * 4 * 0.9 * matrices  # asked for every few births: the last ones may be missed
    assert most["fast"] < 2 * 4 * 4 * WIDTH * (1 + 2 * LAYERS)  # only the norms' weights
    theirs = measured("opacus_per_sample", batch_size=2)
    assert at(theirs, "iter0_after_backward")["book_keeping"] >= 2 * 4 * PARAMETERS


def test_what_is_held_longer_than_autograd_holds_it_is_book_keeping() -> None:
    """One-pass of a short text keeps each layer's input, a saved activation until then, and its output gradient."""
    rows, tokens = 4, 16
    found = measured("flash_clip", batch_size=rows, seq_len=tokens, strategy="one_pass")
    inputs = 3 * WIDTH + 96  # of q, k and v together, of o, of gate and up together, of down
    gradients = 5 * WIDTH + 2 * 96
    pairs = LAYERS * (inputs + gradients) + VOCAB  # and the head's gradient of the logits
    assert found["highest"]["book_keeping_mb"] * MIB >= 4 * rows * tokens * pairs


def test_the_place_of_a_peak_is_a_module_of_the_model() -> None:
    found = measured("vanilla")
    names = {name for name, _ in make_model(TINY, EXPERIMENTS["vanilla"]).named_modules()}
    places = {p["module"] for p in found["phases"]}
    assert places - {None} <= names
    (last,) = [p for p in measured("flash_clip")["phases"] if p["name"] == "iter0_forward"]
    assert last["module"] == "lm_head"
    assert found["largest"] == sorted(found["largest"], key=lambda one: -one["mb"])
    assert sum(one["mb"] for one in found["largest"]) <= found["peak_memory_mb"]
