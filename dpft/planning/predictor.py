"""Simulates one model for each batch size and strategy, and derives predictions, strategy and best batch size."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
from torch import nn

from dpft.clipping.clip_groups import ClipGroupsSpec
from dpft.clipping.strategy_choice import (
    Choice,
    Strategy,
    choose_for_all,
    choose_strategy,
    gradient_bytes,
    kept_bytes,
    use_details,
)
from dpft.errors import DPFTError, UnsupportedModuleError
from dpft.planning.hardware import Hardware
from dpft.planning.long_text import IN_TRANSIT, find_long_context, page_locked_bytes, total_bytes
from dpft.planning.memory import OptimizerName
from dpft.planning.noise import NoiseCost
from dpft.planning.result import LayerPlan, LongText, Plan, Prediction, Transfer, named
from dpft.planning.simulate import Sharding, Simulation, simulate
from dpft.planning.step_meter import Cost
from dpft.rules.base import MatrixUse
from dpft.wrap import get_state, unwrap, wrap

__all__ = ["Predictor"]

STRATEGIES: tuple[Strategy, ...] = ("one_pass", "two_pass", "per_example")
MAX_BATCH_SIZE = 256
# Per-example runs one forward per example, in the simulation too, and keeps all their graphs: only for few examples.
MAX_EXAMPLES_ALONE = 8
# Tokens of the step that is tried first.
SHORT = 16
# A larger batch has to be faster by this fraction to be worth its memory.
WORTH = 0.02


# A step with the isolation check needs up to 4.8 % more memory than one without (*measured*).
PROBE = 1.05


class Predictor:
    """The predictions for one meta twin; each batch size and strategy is simulated once."""

    def __init__(
        self,
        twin: nn.Module,
        seq_len: int,
        sharding: Sharding,
        machine: Hardware,
        memory: int,
        resting: dict[str, int],
        loss_chunk: int | None,
        host: dict[str, int] | None = None,
        host_memory: int | None = None,
        by_shapes: bool = False,
        clip_groups: ClipGroupsSpec | None = None,
        noise: NoiseCost | None = None,
    ) -> None:
        self.clip_groups, self.noise = clip_groups, noise
        self.host, self.host_memory, self.by_shapes = host or {}, host_memory, by_shapes
        self.installed = find_long_context(twin)
        self.twin, self.seq_len, self.sharding, self.machine = twin, seq_len, sharding, machine
        self.memory, self.resting, self.loss_chunk = memory, resting, loss_chunk
        trainable = [p for p in twin.parameters() if p.requires_grad]
        self.itemsize = max(p.element_size() for p in trainable)
        self.dtype = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable}))
        self.uncovered = ""
        self._costs: dict[Hashable, Cost] = {}
        self._simulated: dict[tuple[int, Strategy | None], Simulation] = {}
        self.uses = self._find_uses()

    def restart(self, seq_len: int) -> None:
        """Predict another length; for a copy."""
        self.seq_len, self._simulated, self._costs = seq_len, {}, {}

    def _find_uses(self) -> list[MatrixUse]:
        """The matrices that rules cover; none if one example at a time is the only way, with the reason."""
        state = get_state(wrap(self.twin, loss_chunk=self.loss_chunk))
        self.uncovered, uses = state.one_by_one or "", state.uses
        unwrap(self.twin)
        if state.generic and not self.uncovered:
            try:
                simulate(self.twin, 2, min(self.seq_len, SHORT), "one_pass", loss_chunk=self.loss_chunk)
            except DPFTError as error:
                self.uncovered = f"Not together, since {error}"
        return [] if self.uncovered else uses

    def simulated(self, batch_size: int, strategy: Strategy | None) -> Simulation:
        key = (batch_size, strategy)
        if key not in self._simulated:
            self._simulated[key] = simulate(
                self.twin,
                batch_size,
                self.seq_len,
                strategy,
                self.sharding,
                self.loss_chunk,
                gpu=self.machine.asynchronous,
                costs=self._costs,
                in_transit=IN_TRANSIT if self.machine.asynchronous and self.installed is not None else None,
                clip_groups=self.clip_groups,
            )
        return self._simulated[key]

    def on_host(self, simulation: Simulation) -> dict[str, int]:
        """Bytes of host memory of one rank, by kind."""
        offloaded = total_bytes(simulation.offloaded)
        rounding = page_locked_bytes(simulation.offloaded) - offloaded
        found = {"checkpoint inputs": offloaded, "rounded up to powers of two": rounding, **self.host}
        return {name: size for name, size in found.items() if size}

    def on_all_hosts(self, simulation: Simulation) -> int:
        """Bytes of host memory of all ranks."""
        return sum(self.on_host(simulation).values()) * self.sharding.world_size

    def fits(self, simulation: Simulation) -> bool:
        """Whether device and host have the memory."""
        return self.total(simulation) <= self.memory and (
            self.host_memory is None or self.on_all_hosts(simulation) <= self.host_memory
        )

    def margin(self, batch_size: int) -> float:
        """Fraction of the device's memory that the choice leaves; below 0 also where the host has too little."""
        simulation = self.simulated(batch_size, self.choose(batch_size).strategy)
        left = 1 - self.total(simulation) / self.memory
        return left if left < 0 or self.fits(simulation) else -1.0

    def host_limit(self, batch_size: int, step: int, most: int) -> int:
        """Multiples of ``step`` tokens, at most ``most``, for which the host has the memory: checkpoints' inputs are
        proportional to T."""
        simulation = self.simulated(batch_size, self.choose(batch_size).strategy)

        def fits(units: int) -> bool:
            sizes = Counter({size * units * step // self.seq_len: n for size, n in simulation.offloaded.items()})
            each = page_locked_bytes(sizes) + sum(self.host.values())
            return self.host_memory is None or each * self.sharding.world_size <= self.host_memory

        return bisect_left(range(1, most + 1), True, key=lambda units: not fits(units))

    def short(self, batch_size: int) -> str:
        """What does not fit under the chosen strategy, as text."""
        strategy = self.choose(batch_size).strategy
        simulation = self.simulated(batch_size, strategy)
        found = []
        if self.total(simulation) > self.memory:
            found.append(
                f"the device, {self.total(simulation) / 2**30:.2f} of {self.memory / 2**30:.2f} GiB in "
                f"{simulation.at_peak}: {named(self.on_device(simulation), 4)}"
            )
        if self.host_memory is not None and self.on_all_hosts(simulation) > self.host_memory:
            found.append(
                f"the host, {self.on_all_hosts(simulation) / 2**30:.2f} of {self.host_memory / 2**30:.2f} GiB: "
                f"{named(self.on_host(simulation), 4)} of each rank"
            )
        return f"{strategy} needs " + ", and ".join(found) if found else "nothing"

    def on_device(self, simulation: Simulation) -> dict[str, int]:
        """Bytes of the device at the peak, by name."""
        parts = simulation.parts or {"a step": max(simulation.peak, simulation.accumulating_peak)}
        return {**self.resting, **parts}

    def total(self, simulation: Simulation) -> int:
        return sum(self.resting.values()) + max(simulation.peak, simulation.accumulating_peak)

    def allowance(self, batch_size: int) -> int:
        """Bytes that one-pass may keep: the memory minus everything else that it holds at its peak.

        So the kept bytes are within the allowance exactly if the predicted peak is within the memory, and a running
        training, which decides by a closed form, makes the same choice.
        """
        total = self.total(self.simulated(batch_size, "one_pass"))
        left = self.memory - total
        if left < 0 and total <= self.total(self.simulated(batch_size, "two_pass")):
            left = 0  # neither fits, and two-pass would not need less
        return left + self.extra(batch_size)

    def extra(self, batch_size: int) -> int:
        """Bytes that one-pass keeps beyond one gradient, by the closed form."""
        gradient = 0 if self.sharding.sums_on_host else gradient_bytes(self.uses, self.itemsize)
        if self.sharding.sequence > 1:
            return 0  # there is no other strategy
        if self.sharding.engine != "single":
            return gradient * (batch_size - (0 if self.sharding.gradients else 1))
        return max(0, kept_bytes(self.uses, batch_size, self.seq_len, self.itemsize) - gradient)

    def choose(self, batch_size: int) -> Choice:
        """Chooses with the function that a wrapped model uses; per-example if no rule covers the model."""
        if self.uncovered:
            if self.sharding.sequence > 1:
                raise UnsupportedModuleError(f"one example at a time has no sequence parallelism. {self.uncovered}")
            return Choice("per_example", f"per_example: one example at a time, the only way. {self.uncovered}")
        if self.sharding.sequence > 1:
            return Choice("one_pass", "one_pass: the only way for an example whose tokens are spread over ranks")
        if self.clip_groups is not None:
            return Choice("one_pass", "one_pass: a clip group is weighted as soon as its backward is complete")
        allowed = self.allowance(batch_size)
        if self.sharding.engine == "single":
            meta, elsewhere = torch.device("meta"), self.sharding.sums_on_host
            return choose_strategy(self.uses, batch_size, self.seq_len, self.itemsize, allowed, meta, elsewhere)
        return choose_for_all(
            self.uses, batch_size, self.itemsize, allowed, self.sharding.gradients, self.sharding.parameters
        )

    def _has_a_choice(self) -> bool:
        """Between one-pass and two-pass."""
        return not self.uncovered and self.sharding.sequence == 1 and self.clip_groups is None

    def best_batch_size(self) -> int:
        """The smallest size that fits with a time per example within :data:`WORTH` of the least; 1 if none fits."""
        found: list[tuple[int, float]] = []
        for size in _sizes():
            simulation = self.simulated(size, self.choose(size).strategy)
            if self.total(simulation) * (1.0 if size == 1 else PROBE) > self.memory or not self.fits(simulation):
                break
            found.append((size, self._seconds(simulation) / size))
            if len(found) > 4 and found[-1][1] > (1 - WORTH) * found[-3][1]:
                break  # twice as large and no faster: larger ones will not be either
        best = min((seconds for _, seconds in found), default=0.0)
        return next((size for size, seconds in found if seconds <= (1 + WORTH) * best), 1)

    def plan(self, batch_size: int, name: str, optimizer: OptimizerName | None) -> Plan:
        plain = self.simulated(batch_size, None)
        strategies: Iterable[Strategy] = ("per_example",)
        if not self.uncovered:
            alone = batch_size <= MAX_EXAMPLES_ALONE and self.installed is None
            strategies = STRATEGIES if alone else STRATEGIES[:2]
            if self.sharding.sequence > 1:
                strategies = STRATEGIES[:1]
            elif self.clip_groups is not None:
                strategies = [s for s in strategies if s != "two_pass"]
        predictions = {s: self._predict(self.simulated(batch_size, s), plain) for s in strategies}
        choice = self._settle(self.choose(batch_size), predictions)
        return Plan(
            model=name,
            choice=choice.strategy,
            reason=choice.reason,
            batch_size=batch_size,
            seq_len=self.seq_len,
            dtype=self.dtype,
            plain=self._predict(plain, plain),
            predictions=predictions,
            layers=self._layers(choice.strategy, batch_size),
            allowance=self.allowance(batch_size) if self._has_a_choice() else 0,
            memory=self.memory,
            resting=self.resting,
            hardware=self.machine,
            engine=self.sharding.engine,
            world_size=self.sharding.world_size,
            notes=self._notes(optimizer, batch_size),
            long=self._long(batch_size, choice.strategy),
            noise=self.noise,
        )

    def _long(self, batch_size: int, strategy: Strategy) -> LongText | None:
        """What there is to say of tiles, host memory and sequence parallelism; None if there is none of them."""
        simulation = self.simulated(batch_size, strategy)
        host = self.on_host(simulation)
        if self.installed is None and not host and self.sharding.sequence == 1:
            return None
        transfer = None
        if simulation.offloaded:
            each = max(simulation.offloaded)
            forward, backward = (self.machine.seconds(operations) for operations in simulation.layer)
            transfer = Transfer(each, each / self.machine.link, forward, backward)
        return LongText(
            tiled=self.installed is not None,
            sequence_parallel=self.sharding.sequence,
            device=self.on_device(simulation),
            at_peak=simulation.at_peak,
            host=host,
            host_total=self.on_all_hosts(simulation),
            host_memory=self.host_memory,
            transfer=transfer,
        )

    def _predict(self, simulation: Simulation, plain: Simulation) -> Prediction:
        seconds = self._seconds(simulation)
        total = self.total(simulation)
        return Prediction(
            flops=simulation.flops(),
            attention_flops=simulation.flops() - simulation.flops(attention=False),
            seconds=seconds,
            peak_bytes=simulation.peak,
            accumulating_peak_bytes=simulation.accumulating_peak,
            total_bytes=total,
            time_ratio=seconds / self._seconds(plain),
            memory_ratio=simulation.peak / plain.peak,
            fits=self.fits(simulation),
        )

    def _seconds(self, simulation: Simulation) -> float:
        """Of a step, with the time that it waits for checkpoints' inputs on their way to the host and back."""
        seconds = self.machine.seconds(simulation.operations)
        for size, count in simulation.offloaded.items():
            moves = (self.machine.seconds(operations) for operations in simulation.layer)
            seconds += sum(max(0.0, size / self.machine.link - computes) for computes in moves) * count
        return seconds

    def _settle(self, choice: Choice, predictions: dict[Strategy, Prediction]) -> Choice:
        """The choice, with the reason extended by the predictions; per-example if only that fits."""
        chosen, alone = predictions[choice.strategy], predictions.get("per_example")
        if not chosen.fits and alone is not None and alone.fits and choice.strategy != "per_example":
            return Choice(
                "per_example",
                "per_example: alone fits. strategy='auto' does not take it; ask for it in wrap. Otherwise "
                + choice.reason,
            )
        reason = choice.reason
        if not chosen.fits:
            short = (chosen.total_bytes - self.memory) / 2**30
            where = f"{short:.2f} GiB too much" if short > 0 else "too much in host memory"
            reason += f". DOES NOT FIT: {where}. A shorter T or a smaller B, checkpointing, an engine"
            reason += " that shards, or LoRA"
        elif alone is not None and alone.fits and alone.seconds < 0.95 * chosen.seconds:
            reason += f". per_example is predicted {alone.seconds / chosen.seconds:.2f} x its time: ask for it in wrap"
        return Choice(choice.strategy, reason)

    def _layers(self, strategy: Strategy, batch_size: int) -> list[LayerPlan]:
        kinds: dict[tuple[str, str, str], list[int]] = {}
        for detail in use_details(self.uses, strategy, batch_size, self.seq_len, self.itemsize):
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", detail.key)
            sums = kinds.setdefault((name, detail.shape, detail.method), [0, 0, 0])
            # A group keeps nothing, unless an engine that shards hides from the graph what belongs to it.
            kept = detail.kept if self.clip_groups is None or self.sharding.parameters else 0
            for i, value in enumerate((1, detail.flops, kept)):
                sums[i] += value
        return [
            LayerPlan(name, count, shape, method, flops, kept)
            for (name, shape, method), (count, flops, kept) in kinds.items()
        ]

    def _notes(self, optimizer: OptimizerName | None, batch_size: int) -> list[str]:
        notes = []
        if optimizer is None:
            notes.append("no optimiser is counted: optimizer='adamw' adds its states")
        if self.sharding.engine != "single":
            notes.append("communication takes no time here; engine figures are counted, not measured on devices")
        if self.installed is not None and self.sharding.engine == "zero3":
            notes.append(
                "zero3 gathers weights for each call of a layer, so that nothing runs in tiles; fsdp2 has tiles"
            )
        elif self.by_shapes:
            notes.append("the blocks that run in tiles were found by their shapes: dpft.long_context looks at values")
        if self.installed is not None:
            notes.append("plain is with dpft.long_context and a head in chunks, too; its .grad is on the device")
        longest = getattr(getattr(self.twin, "config", None), "max_position_embeddings", None)
        if self.installed is not None and isinstance(longest, int) and self.seq_len > longest:
            notes.append(f"the model's max_position_embeddings are {longest:,}")
        if batch_size > 1:
            notes.append("backward 1, 2, 4, 8, ... have the isolation check besides, and hold what two_pass holds")
        return notes


def _sizes() -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to :data:`MAX_BATCH_SIZE`."""
    powers = [1 << k for k in range(MAX_BATCH_SIZE.bit_length())]
    return sorted(n for n in {*powers, *(3 * n for n in powers)} if n <= MAX_BATCH_SIZE)
