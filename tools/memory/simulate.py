"""Profiles of steps on tensors without data: the very code, its storages, and nothing computed.

A simulated step differs from a real one in this. dpft's isolation check does not run, as in most real steps. A layer's
norm is run once for each shape, and counted wherever it is asked for. A GPU's kernels are taken where ``--device`` is
``cuda``; attention is the fused kernel's. What a rank of an engine holds is what one process holds, divided where the
engine divides it, with the parameters that it gathers and the copies that DeepSpeed keeps; the engines' buffers for
communication are not in it.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpft.kernels.head import auto_chunk
from dpft.long_context.install import install
from dpft.long_context.offload import HostCopies, Offloader, Parked, PinnedCopy
from dpft.planning.long_text import IN_TRANSIT, HostMeter, install_on_meta
from dpft.planning.memory import resting_bytes
from dpft.planning.simulate import Sharding, ready_on_meta, simulated
from tools.memory.replay import Shares
from tools.memory.setup import Setup
from tools.memory.tracker import Tracker


@contextlib.contextmanager
def simulation(setup: Setup, tracker: Tracker) -> Iterator[None]:
    """Inside, models of meta tensors take steps, where the setup says that they are to."""
    if not setup.simulate:
        yield
        return
    tracker.inside = None if setup.device == "cuda" else converted_bytes
    with simulated(tracker, setup.device == "cuda"):
        yield
    tracker.inside = None


def converted_bytes(func: Any, args: Any) -> int:
    """What a CPU's elementwise operation takes for operands that it converts first: it is given several dtypes.

    torch's ``TensorIterator`` does so on a CPU; on a GPU its kernels convert what they load.
    """
    if func.overloadpacket not in _MIXING:
        return 0
    given = [t for t in args if isinstance(t, Tensor) and t.dim() > 0]
    if len({t.dtype for t in given}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (t.dtype for t in given))
    return sum(t.numel() * common.itemsize for t in given if t.dtype != common)


_MIXING = frozenset(
    getattr(torch.ops.aten, name + place) for name in ("add", "sub", "mul", "div", "addcmul") for place in ("", "_")
)


def resolved(setup: Setup) -> Setup:
    """With what is chosen by the device chosen for the one that is simulated, not for tensors without data."""
    if not setup.simulate or setup.loss_chunk != "auto":
        return setup
    return replace(setup, loss_chunk=auto_chunk(torch.device(setup.device)))


class HostCount:
    """Checkpoints' inputs in host memory: what the tracker, which follows one device, does not see.

    Attributes:
        events: nanoseconds of ``time.perf_counter_ns``, and bytes from then on.

    Args:
        park: takes a tensor to the host.
    """

    def __init__(self, park: Callable[[Tensor], Parked]) -> None:
        self._park = park
        self.events: list[tuple[int, int]] = [(time.perf_counter_ns(), 0)]

    def park(self, t: Tensor) -> Parked:
        """For an offloader."""
        parked, size = self._park(t), t.numel() * t.element_size()
        self._change(size)
        weakref.finalize(parked, self._change, -size)
        return parked

    def _change(self, size: int) -> None:
        self.events.append((time.perf_counter_ns(), self.events[-1][1] + size))


def turn_long_context_on(setup: Setup, model: nn.Module) -> HostCount | None:
    """``dpft.long_context``, plain or private, where the setup asks for it.

    On a CPU the inputs of checkpoints are copied to memory that its allocator has not made, as a GPU's are to its
    host's; without data they are counted.
    """
    if not setup.long_context:
        return None
    if setup.simulate:
        count = HostCount(HostMeter(IN_TRANSIT if setup.device == "cuda" else 0).park)
        install_on_meta(model, offloader=Offloader(count.park))
        return count
    count = HostCount(PinnedCopy if setup.device == "cuda" else HostCopies)
    install(model, "auto", Offloader(count.park))
    return count


def make_ready(setup: Setup, model: nn.Module, library: str) -> None:
    """What a wrapped model without data needs before its first step."""
    if setup.simulate and library == "dpft":
        ready_on_meta(model)


def shares_of(setup: Setup, model: nn.Module, library: str) -> Shares | None:
    """What a rank of the engine holds of each component; None where there is one process."""
    if setup.engine == "single":
        return None
    sharding: Any = Sharding(setup.engine, setup.world_size)  # type: ignore[arg-type]  # argparse knows the names
    resting = resting_bytes(model, sharding, "adamw")
    trainable = [p for p in model.parameters() if p.requires_grad]
    buckets = 0
    if setup.engine == "ddp" and library == "plain":  # private training does without its buckets
        buckets = sum(p.numel() * p.element_size() for p in trainable)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return Shares(
        factors={"gradients": 1 / setup.world_size if sharding.gradients else 1.0},
        constants={
            "model_parameters": resting["parameters and buffers"] - buffers + resting.get("gathered parameters", 0),
            "optimizer_states": resting.get("optimiser states", 0),
        },
        added={"gradients": resting.get("DeepSpeed's gradients", 0) + buckets},
    )
