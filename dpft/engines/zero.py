"""DeepSpeed ZeRO: the clipped sums of its shards, and the optimiser that DeepSpeed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpft.engines.ranks import Ranks
from dpft.engines.sums import ClippedSums, Piece
from dpft.engines.zero_layout import Layout
from dpft.errors import EngineError
from dpft.optimizer import DPOptimizer, Noise


class ZeroSums(ClippedSums):
    """Sums in the layout of ZeRO's flat partitions.

    Under ZeRO-1 a rank sums whole gradients and sends the other ranks their parts at the release; under ZeRO-2 and 3
    each gradient is reduced to its owners as soon as it is added.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks, layout: Layout) -> None:
        super().__init__(parameters, ranks)
        self.layout = layout
        self._whole: dict[str, Tensor] = {}
        self._flats: dict[int, Tensor] = {}
        mine = [f for parts in layout.fragments.values() for f in parts if f.rank == ranks.rank]
        self._count_owned(sum(f.numel for f in mine))

    def add(self, name: str, grad: Tensor) -> None:
        self.check_new(name, grad)
        if self.layout.stage == 1:
            self._whole[name] = self._whole[name].add_(grad) if name in self._whole else grad
        else:
            self._send(name, grad)

    def _send(self, name: str, grad: Tensor) -> None:
        flat = grad.reshape(-1).float()  # the master weights are float32
        parts, world, rank = self.layout.fragments[name], self.ranks.world, self.ranks.rank
        part = self.equal_parts(name)
        if part is not None:
            if flat.numel() < part * world:
                flat = torch.nn.functional.pad(flat, (0, part * world - flat.numel()))
            own = torch.empty(part, dtype=flat.dtype, device=flat.device)
            work = dist.reduce_scatter_tensor(own, flat, async_op=True)
            self.later(work, lambda: self.accumulate(name, own))
            return
        for f in parts:
            piece = flat[f.start : f.start + f.numel]
            work = dist.reduce(piece, dst=f.rank, async_op=True)
            if f.rank == rank:
                self.later(work, lambda piece=piece: self.accumulate(name, piece))  # type: ignore[misc]  # bound now
            else:
                self.later(work, lambda piece=piece: None)  # type: ignore[misc]  # kept alive until it is sent

    def accumulate(self, name: str, piece: Tensor) -> None:
        own = self._own(name)
        if own is not None:
            own.add_(piece[: own.numel()].to(own.device))

    def equal_parts(self, name: str) -> int | None:
        if self.layout.stage < 3:
            return None
        return int(self.parameters[name].ds_tensor.ds_numel)  # type: ignore[attr-defined]  # ZeRO-3's attribute

    def pieces(self, name: str) -> Sequence[Piece]:
        return self.layout.fragments[name]

    def _own(self, name: str) -> Tensor | None:
        """This rank's part of one parameter's sum: a view into the buffer of its flat partition."""
        for f in self.layout.fragments[name]:
            if f.rank == self.ranks.rank:
                return self._flat(f.flat)[f.offset : f.offset + f.numel]
        return None

    def _flat(self, number: int) -> Tensor:
        if number not in self._flats:
            self._flats[number] = torch.zeros_like(self.layout.flats[number], requires_grad=False)
        return self._flats[number]

    def release(self, noise: Noise, std: float, divisor: float) -> None:
        self._released = True
        for name, shape in self.shapes.items() if self.layout.stage == 1 and not self.spread else ():
            held = self._whole.pop(name, None)
            if held is None:
                held = torch.zeros(shape, dtype=torch.float32, device=self.ranks.device)
            self._send(name, held)
        self.settle()
        noised = 0
        for name in self.parameters:
            own = self._own(name)
            if own is not None:
                start = next(f.start for f in self.layout.fragments[name] if f.rank == self.ranks.rank)
                noise.add_(own, std, self.place(name, start))
                own.div_(divisor)
                noised += own.numel()
        self._check_noised(noised)

    def gradient(self, name: str) -> Tensor:
        raise NotImplementedError("ZeRO steps on flat partitions: see flat_gradient")

    def flat_gradient(self, number: int) -> Tensor:
        """The release, in the layout of one flat partition; its padding is zero. Not kept here afterwards."""
        flat = self._flat(number)
        del self._flats[number]
        return flat

    def discard(self) -> None:
        self._forget()
        self._whole.clear()
        self._flats.clear()


class ZeroOptimizer(DPOptimizer):
    """The private optimiser where DeepSpeed decides when to step: inside ``accelerator.backward``.

    The release is made in a step hook of the innermost torch optimiser, which ZeRO calls once for each flat partition.
    There DeepSpeed passes a gradient of zeros, since it never receives one; anything else is an error. If the hook did
    not run at all, the parameters would step on zeros and :meth:`step` would raise: a sum without noise never reaches
    the parameters.

    Args:
        optimizer: the innermost one.
        sums: of the shards.
        **mechanism: as :class:`dpft.DPOptimizer`'s.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sums: ZeroSums, **mechanism: Any) -> None:
        self._numbers = {id(flat): number for number, flat in enumerate(sums.layout.flats)}
        self._pending: set[int] | None = None  # flat partitions that the running release has not reached
        self._zero_sums = sums
        # Buffers for gradients that DeepSpeed keeps, with its optimiser on the CPU; else it gives one at each step.
        self._kept = {number for number, flat in enumerate(sums.layout.flats) if flat.grad is not None}
        super().__init__(optimizer, sums=sums, **mechanism)

    def _only_through_here(self, *_: Any) -> None:
        """The step hook: before the innermost optimiser changes anything."""
        if self._pending is None:
            self._begin()
        assert self._pending is not None
        for group in self.inner.param_groups:
            for flat in group["params"]:
                number = self._numbers.get(id(flat))
                if number is None or number not in self._pending:
                    if flat.grad is None:
                        continue
                    raise EngineError(
                        f"DeepSpeed steps on a partition of shape {list(flat.shape)} that "
                        + ("dpft does not know" if number is None else "was stepped in this release already")
                        + "; its gradient would not be private. This version of DeepSpeed is not supported."
                    )
                self._fill(flat, number)

    def _fill(self, flat: Tensor, number: int) -> None:
        assert self._pending is not None
        if flat.grad is None:  # its turn comes later
            return
        release = self._zero_sums.flat_gradient(number)
        if flat.grad.shape != release.shape or flat.grad.dtype != torch.float32:
            raise EngineError(
                f"DeepSpeed gives partition {number} a gradient of {flat.grad.dtype} {list(flat.grad.shape)}; "
                f"expected float32 {list(release.shape)}. Remove bf16_master_weights_and_grads from its configuration."
            )
        if bool(flat.grad.any()):
            raise EngineError(
                "DeepSpeed has a gradient of its own, which did not come through the clip boundary: something besides "
                "model(**batch).loss was differentiated, or another hook writes gradients. It was not applied."
            )
        if number in self._kept:
            flat.grad.copy_(release)
        else:
            # Of a parameter that is alone in its partition, ZeRO-3's gradient is a view into the buffer that the next
            # step's gradient is taken from: that one would be this release.
            flat.grad = release
        self._pending.discard(number)

    def _begin(self) -> None:
        if self._is_last is not None and not self._is_last():
            raise EngineError(
                "DeepSpeed steps in the middle of a logical batch. Set gradient_accumulation_steps to 1 in its "
                "configuration, and take the batches from dpft's loader."
            )
        self._before_release()
        std = self.noise_std(self._zero_sums.parameters.values())
        with self.noise.release():
            self._zero_sums.release(self.noise, std, self.expected_batch_size)
        self._pending = set(range(len(self._zero_sums.layout.flats)))
        self.releases += 1
        self._spent = True

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """Confirm that DeepSpeed made the step of the logical batch that has ended.

        Raises:
            EngineError: it stepped on some partitions only, or on none.
        """
        if closure is not None:
            raise ValueError("DPOptimizer.step takes no closure: a release uses one gradient, computed once")
        if self._is_last is not None and not self._is_last():
            return
        left = None if self._pending is None else len(self._pending)
        if left is None or left:
            raise EngineError(
                f"DeepSpeed stepped on {'none' if left is None else 'all but ' + str(left)} of its "
                f"{len(self._zero_sums.layout.flats)} partitions in this logical batch: call "
                "accelerator.backward(loss) before optimizer.step(), once for each batch, and do not replace the "
                "optimiser that was passed to dpft.prepare."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """End the logical batch, once its release was made."""
        if self._spent:
            self.discard()

    def discard(self) -> None:
        """As :meth:`DPOptimizer.discard`; the gradients that DeepSpeed keeps are zeroed."""
        self._link()  # DeepSpeed loads a checkpoint into the inner optimiser itself, which then has other groups
        for p in self.parameters():
            p.grad = None
        for flat in self._zero_sums.layout.flats:
            if flat.grad is not None:  # a buffer that DeepSpeed keeps, on the CPU
                flat.grad.zero_()
        self._zero_sums.discard()
        self._pending, self._spent = None, False

    def parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters: the inner optimiser has flat partitions of them."""
        return list(self._zero_sums.parameters.values())
