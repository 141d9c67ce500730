"""What :func:`dpft.plan` returns, and how it prints."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from dpft.clipping.strategy_choice import Strategy
from dpft.planning.hardware import Hardware
from dpft.planning.noise import NoiseCost
from dpft.planning.simulate import EngineName

__all__ = ["LayerPlan", "LongText", "Plan", "Prediction", "Transfer", "aligned", "named"]

_GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one physical batch, plain or with one strategy.

    Attributes:
        flops: a multiply-add counted as two, attention without causal skipping, as ``FlopCounterMode`` counts.
        attention_flops: those of the fused attention kernels, which ``FlopCounterMode`` does not see on a CPU.
        seconds: on the plan's hardware, without communication.
        peak_bytes: above parameters, buffers and the batch, of a step that starts with ``.grad`` empty.
        accumulating_peak_bytes: the same for a step that adds to the gradient of an earlier physical batch.
        total_bytes: the larger of the two plus the plan's ``resting``: what the device must hold.
        time_ratio: seconds over those of the plain step.
        memory_ratio: peak_bytes over those of the plain step.
        fits: whether total_bytes is within the plan's memory.
    """

    flops: int
    attention_flops: int
    seconds: float
    peak_bytes: int
    accumulating_peak_bytes: int
    total_bytes: int
    time_ratio: float
    memory_ratio: float
    fits: bool


@dataclass(frozen=True)
class LayerPlan:
    """One group of trainable matrices, whose names differ only in layer numbers and whose shapes are equal.

    Attributes:
        name: with ``*`` for the numbers.
        count: how many there are.
        shape: as text.
        method: how the chosen strategy takes its norm.
        norm_flops: of all their norms, beyond a plain step.
        kept_bytes: bytes that one-pass keeps for all of them.
    """

    name: str
    count: int
    shape: str
    method: str
    norm_flops: int
    kept_bytes: int


@dataclass(frozen=True)
class Transfer:
    """The way of one layer's input to host memory and back, beside the computation.

    Attributes:
        bytes: of the input.
        seconds: one way, by the hardware's link.
        forward_seconds: of the layer's forward, beside which it goes to the host.
        backward_seconds: of its backward with the recomputation, beside which that of the layer before comes back.
    """

    bytes: int
    seconds: float
    forward_seconds: float
    backward_seconds: float

    @property
    def binds(self) -> bool:
        """Whether the computation waits for it."""
        return self.seconds > min(self.forward_seconds, self.backward_seconds)


@dataclass(frozen=True)
class LongText:
    """Long context, host memory and sequence parallelism of a plan, under its choice.

    Attributes:
        tiled: whether :func:`dpft.long_context` is on.
        sequence_parallel: ranks over which a text is spread.
        device: bytes of a rank's device at the peak, by name, those at rest among them.
        at_peak: what runs then.
        host: bytes of host memory of a rank, by name.
        host_total: of all ranks.
        host_memory: what they have to fit into; None: whatever they take.
        transfer: of checkpoints' inputs; None: they stay on the device.
    """

    tiled: bool
    sequence_parallel: int
    device: dict[str, int]
    at_peak: str
    host: dict[str, int]
    host_total: int
    host_memory: int | None
    transfer: Transfer | None


def named(sizes: dict[str, int], most: int = 8) -> str:
    """The largest of the sizes, in GiB, with what they are."""
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    found = [f"{name} {size / _GIB:.2f}" for name, size in ranked[:most] if size >= 0.005 * _GIB]
    rest = sum(size for _, size in ranked) - sum(size for _, size in ranked[: len(found)])
    return ", ".join([*found, *([f"the rest {rest / _GIB:.2f}"] if rest >= 0.005 * _GIB else [])]) + " GiB"


@dataclass(frozen=True)
class Plan:
    """The result of :func:`dpft.plan`. ``str()`` is a table; :meth:`to_dict` is for JSON.

    Attributes:
        model: class of the model.
        choice: the strategy to take; ``wrap(strategy="auto", memory=plan.allowance)`` takes it too, but for
            ``"per_example"``, which must be requested.
        reason: why, as text with figures.
        batch_size: B, requested or found.
        seq_len: T.
        dtype: of the trainable parameters.
        plain: the step without privacy.
        predictions: by strategy, without those that do not cover the model, and without per-example above 8 examples.
        layers: per group of matrices, under the chosen strategy.
        allowance: bytes that one-pass may keep beyond one gradient: ``memory=`` of :func:`dpft.wrap`.
        memory: bytes that were planned for, on each rank.
        resting: bytes that stay allocated between steps, by kind, on each rank.
        hardware: what the times are for.
        engine: the training engine.
        world_size: its number of ranks.
        notes: what the figures do not include.
        long: tiles, host memory and sequence parallelism; None where there is none of them.
        noise: of a logical batch; None where no ``privacy`` was given.
    """

    model: str
    choice: Strategy
    reason: str
    batch_size: int
    seq_len: int
    dtype: str
    plain: Prediction
    predictions: dict[Strategy, Prediction]
    layers: list[LayerPlan]
    allowance: int
    memory: int
    resting: dict[str, int]
    hardware: Hardware
    engine: EngineName
    world_size: int
    notes: list[str]
    long: LongText | None = None
    noise: NoiseCost | None = None

    @property
    def fits(self) -> bool:
        """Whether the chosen strategy fits in the memory."""
        return self.predictions[self.choice].fits

    def to_dict(self) -> dict[str, Any]:
        """All fields, serialisable to JSON."""
        found = dataclasses.asdict(dataclasses.replace(self, hardware=None))  # type: ignore[arg-type]  # dtypes cannot be JSON keys
        found["hardware"] = {
            "name": self.hardware.name,
            "memory": self.hardware.memory,
            "source": self.hardware.source,
        }
        return {**found, "fits": self.fits}

    def __str__(self) -> str:
        return _table(self)


def _table(plan: Plan) -> str:
    """Several lines: what was planned, a row per strategy, a row per group of layers, the reason."""
    ranks = "" if plan.engine == "single" else f", {plan.engine} on {plan.world_size} ranks"
    machine = plan.hardware
    lines = [
        f"{plan.model}, {plan.dtype}: {plan.batch_size} x {plan.seq_len:,} tokens{ranks}",
        f"{machine.name} ({machine.source}), {plan.memory / _GIB:.2f} GiB; times and peaks are predicted",
        "at rest: " + ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in plan.resting.items()),
        "",
    ]
    head = ["", "TFLOP", "seconds", "x plain", "peak GiB", "x plain", "again GiB", "all GiB", "fits"]
    rows = [_row("plain", plan.plain)]
    rows += [_row(name + (" *" if name == plan.choice else ""), found) for name, found in plan.predictions.items()]
    lines += aligned([head, *rows])
    lines += [
        "peak: above parameters and batch; again: onto a gradient that is there; all: the larger and what is at rest",
        "",
    ]
    head = [f"layers under {plan.choice}", "count", "what", "norm by", "GFLOP", "keeps MiB"]
    lines += aligned(
        [
            head,
            *(
                [
                    layer.name,
                    str(layer.count),
                    layer.shape,
                    layer.method,
                    f"{layer.norm_flops / 1e9:,.1f}",
                    f"{layer.kept_bytes / 2**20:,.1f}",
                ]
                for layer in plan.layers
            ),
        ]
    )
    lines += _long_lines(plan)
    lines += [] if plan.noise is None else ["", str(plan.noise)]
    lines += ["", f"* {plan.reason}", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)


def _long_lines(plan: Plan) -> list[str]:
    long = plan.long
    if long is None:
        return []
    total = plan.predictions[plan.choice].total_bytes
    lines = [
        "",
        f"device: {total / _GIB:.2f} of {plan.memory / _GIB:.2f} GiB, most in {long.at_peak or 'a step'}:",
        *_indented(named(long.device)),
    ]
    if long.sequence_parallel > 1:
        lines.insert(1, f"{long.sequence_parallel} ranks share the tokens of a text")
    if long.host:
        of = "" if long.host_memory is None else f" of {long.host_memory / _GIB:.2f}"
        ranks = "" if plan.world_size == 1 else f" for {plan.world_size} ranks, of each"
        lines += [f"host: {long.host_total / _GIB:.2f}{of} GiB{ranks}:", *_indented(named(long.host))]
    if long.transfer is not None:
        move = long.transfer
        lines.append(
            f"offload: an input of {move.bytes / _GIB:.2f} GiB takes {1e3 * move.seconds:.1f} ms one way, beside "
            f"{1e3 * move.forward_seconds:.1f} ms of a layer's"
        )
        words = "THE STEP WAITS FOR IT" if move.binds else "no waiting"
        lines.append(f"  forward and {1e3 * move.backward_seconds:.1f} ms of its backward: {words}")
    return lines


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 115, initial_indent="  ", subsequent_indent="  ")


def _row(name: str, found: Prediction) -> list[str]:
    return [
        name,
        f"{found.flops / 1e12:,.3f}",
        f"{found.seconds:,.3f}",
        f"{found.time_ratio:.2f}",
        f"{found.peak_bytes / _GIB:,.2f}",
        f"{found.memory_ratio:.2f}",
        f"{found.accumulating_peak_bytes / _GIB:,.2f}",
        f"{found.total_bytes / _GIB:,.2f}",
        "yes" if found.fits else "no",
    ]


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
