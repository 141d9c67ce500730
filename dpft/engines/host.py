"""One process with its clipped sums and its optimiser in host memory: ``dpft.prepare(..., sums_device="cpu")``.

The device keeps the parameters alone, in their own dtype. A layer's weighted gradient goes to a float32 sum on the
host as soon as it is computed; noise, division and the optimiser's step on float32 masters follow there, and the
device gets the new parameters.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpft.engines.ranks import Ranks
from dpft.engines.sums import ClippedSums
from dpft.errors import EngineError, PrivacyConfigError
from dpft.optimizer import DPOptimizer, Noise

# Bytes of one page-locked buffer, and how many there are: one is filled while the other one is read. The sums are not
# page-locked themselves: that would take 4 bytes a parameter from what the system can use otherwise.
PIECE = 1 << 26
BUFFERS = 2

# Their steps are functions of one element's gradient and state, so it does not matter where a tensor is. By exact
# type: what a subclass does is not known.
_OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip
_FUSED = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # on a CPU


def check_sums_device(sums_device: Any, kind: str, clipping: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what cannot be trained with sums and optimiser in host memory.

    Raises:
        PrivacyConfigError: a device other than None and ``"cpu"``.
        EngineError: an engine of several processes, no clipping, or an optimiser of which it is not known that it
            computes the same steps there.
    """
    if sums_device is None:
        return
    if sums_device != "cpu":
        raise PrivacyConfigError(
            f"sums_device is {sums_device!r}; expected None (in .grad, on the model's device) or 'cpu' (host memory)"
        )
    if kind != "single":
        raise EngineError(
            f"sums_device='cpu' is for one process, and this is {kind}. Engines have their own: use "
            "recipes/accelerate/zero2_offload.yaml (DeepSpeed, sums and optimiser in host memory), or "
            "fsdp_offload_params: true under FSDP2."
        )
    if clipping == "none":
        raise EngineError("clipping='none' leaves its sums in .grad. Leave out sums_device.")
    if type(optimizer) not in _OPTIMIZERS:
        raise EngineError(
            f"sums_device='cpu' moves the optimiser to host memory, and it is not known whether a "
            f"{type(optimizer).__name__} computes the same steps there; expected one of "
            f"{', '.join(cls.__name__ for cls in _OPTIMIZERS)} of torch.optim."
        )
    for group in optimizer.param_groups:
        wrong = [name for name in ("capturable", "differentiable") if group.get(name)]
        if wrong:
            raise EngineError(f"the optimiser is {wrong[0]}=True, which needs it on the device. Leave it out.")
        if isinstance(group.get("lr"), Tensor) and group["lr"].device.type != "cpu":
            raise EngineError(f"the optimiser's lr is a tensor on {group['lr'].device}; give a number.")


class Staging:
    """Copies between a device and host memory, in pieces, through two page-locked buffers.

    On a GPU a copy runs beside the computation. A buffer is read by the host, or used again, only after the event
    behind its copy, and a tensor that is read is kept until then. A model on the CPU needs no buffers.

    Args:
        device: of the model.
        piece: bytes of a buffer.
    """

    def __init__(self, device: torch.device, piece: int = PIECE) -> None:
        self.device, self.piece = device, piece
        self._cuda = device.type == "cuda"
        self._direct = device.type == "cpu"
        self._buffers: list[Tensor] = []
        self._next = 0
        # for each copy on its way: waits for its end; uses what arrived; the tensor to be kept until then
        self._travelling: deque[tuple[Callable[[], None], Callable[[], None], Tensor]] = deque()
        self._beside = torch.cuda.Stream(device) if self._cuda else None

    def to_host(self, source: Tensor, then: Callable[[int, Tensor], None]) -> None:
        """Copy ``source``; ``then(start, piece)`` gets its flat elements from ``start`` on, at the latest by settle.

        The caller does not change ``source`` any more; ``piece`` is valid during the call.
        """
        flat = source.detach().reshape(-1)
        if self._direct:
            then(0, flat)
            return
        step = self.piece // flat.element_size()
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            buffer = self._free_buffer(piece)
            self._travelling.append((self._send(buffer, piece), functools.partial(then, start, buffer), piece))

    def to_device(self, target: Tensor, source: Tensor) -> None:
        """``target.copy_(source)`` from host memory, in the order of the device's stream."""
        target = target.detach()
        if self._direct or not target.is_contiguous():
            target.copy_(source)
            return
        flat, given = target.view(-1), source.detach().view(-1)
        step = self.piece // flat.element_size()
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            buffer = self._free_buffer(piece)
            buffer.copy_(given[start : start + step])
            self._travelling.append((self._receive(piece, buffer), _nothing, piece))

    def settle(self) -> None:
        """Wait for all copies, and use what arrived."""
        while self._travelling:
            self._arrive()

    def forget(self) -> None:
        """Wait for all copies, and drop what arrived."""
        while self._travelling:
            wait, _, _ = self._travelling.popleft()
            wait()

    def _free_buffer(self, piece: Tensor) -> Tensor:
        """A buffer of the piece's dtype and size. They are used in turn, so the next one is the first to be free."""
        if not self._buffers:
            shape = (BUFFERS, self.piece)
            self._buffers = list(torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda).unbind())
        while len(self._travelling) >= BUFFERS:
            self._arrive()
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        return buffer[: piece.numel() * piece.element_size()].view(piece.dtype)

    def _arrive(self) -> None:
        wait, then, _ = self._travelling.popleft()
        wait()
        then()

    def _send(self, buffer: Tensor, piece: Tensor) -> Callable[[], None]:
        """Begin to copy from the device, after what its stream was given so far; returns what waits for the end."""
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(buffer, piece, self._beside)

    def _receive(self, piece: Tensor, buffer: Tensor) -> Callable[[], None]:
        """Begin to copy to the device, between what its stream was given before and what it is given later."""
        return self._copy(piece, buffer, torch.cuda.current_stream(self.device) if self._cuda else None)

    def _copy(self, target: Tensor, source: Tensor, stream: Any) -> Callable[[], None]:
        if stream is None:
            target.copy_(source)
            return _nothing
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            end = torch.cuda.Event()
            end.record(stream)
        return end.synchronize


def _nothing() -> None:
    pass


class HostSums(ClippedSums):
    """The sums of one process, in host memory: float32, or float64 for float64 parameters.

    Noise is drawn there, by the generator of the CPU, for each element once. The memory is kept between batches.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks, staging: Staging) -> None:
        super().__init__(parameters, ranks)
        self.staging = staging
        self._sums = {name: _master_like(p) for name, p in parameters.items()}
        self._begun: set[str] = set()  # those that something of this logical batch was added to
        self._count_owned(self.total)

    def add(self, name: str, grad: Tensor) -> None:
        self.check_new(name, grad)
        flat, first = self._sums[name].view(-1), name not in self._begun
        self._begun.add(name)

        def arrived(start: int, piece: Tensor) -> None:
            part = flat[start : start + piece.numel()]
            if first:
                part.copy_(piece)
            else:
                part.add_(piece)

        self.staging.to_host(grad, arrived)

    def settle(self) -> None:
        self.staging.settle()

    def release(self, noise: Noise, std: float, divisor: float) -> None:
        self._released = True
        self.settle()
        noised = 0
        for name, total in self._sums.items():
            if name not in self._begun:
                total.zero_()
            noise.add_(total, std)
            total.div_(divisor)
            noised += total.numel()
        self._check_noised(noised)

    def gradient(self, name: str) -> Tensor:
        """The released gradient; valid until :meth:`discard`, after which its memory has the next sum."""
        return self._sums[name]

    def discard(self) -> None:
        self.staging.forget()
        self._forget()
        self._begun.clear()


class HostOptimizer(DPOptimizer):
    """The user's optimiser on float32 masters in host memory, ``fused`` where torch has that for a CPU.

    The inner optimiser is the user's own object, whose groups then hold the masters in the places of the model's
    parameters: schedulers and hooks stay as they are. After each release the model's parameters are the masters,
    rounded to their dtype. A parameter that something else has changed since is stepped from its new value.

    ``state_dict`` has the masters too, so that a resumed training is bitwise the one that was not interrupted. One
    without masters, of a training with its sums on the device, can be loaded: they are then the model's parameters.

    Args:
        optimizer: with the parameters of a model that is on its device.
        sums: of these parameters.
        **mechanism: as :class:`dpft.DPOptimizer`'s.

    Guarantee: that of :class:`DPOptimizer`. What the step sees is the release; the masters, and the parameters that
    are rounded from them, are functions of releases alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sums: HostSums, **mechanism: Any) -> None:
        self._host_sums = sums
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        masters = [nn.Parameter(_master_like(p).copy_(p.detach())) for p in trained]
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = list(zip(trained, masters, strict=True))
        self._originals = {id(master): p for p, master in self._pairs}
        on_device = [{k: v for k, v in group.items() if k in ("fused", "foreach")} for group in optimizer.param_groups]
        self._on_device: list[dict[str, Any]] = on_device
        self._on_host: dict[str, Any] = {"fused": True, "foreach": False} if type(optimizer) in _FUSED else {}
        _exchange(optimizer, {id(p): m for p, m in self._pairs}, [self._on_host] * len(on_device))
        super().__init__(optimizer, sums=sums, **mechanism)

    def parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters of all groups, in order, not their masters."""
        given = [self._originals.get(id(p), p) for group in self.param_groups for p in group["params"]]
        return [p for p in given if p.requires_grad]

    def detach(self) -> torch.optim.Optimizer:
        """As :meth:`DPOptimizer.detach`; the inner optimiser gets the model's parameters and device back."""
        inner = super().detach()
        self.discard()
        _exchange(inner, self._originals, self._on_device)
        self._link()
        return inner

    def _fill_gradients(self) -> None:
        self._host_sums.release(
            self.noise, self.noise_std(self._host_sums.parameters.values()), self.expected_batch_size
        )
        names = {id(p): name for name, p in self._host_sums.parameters.items()}
        for p, master in self._pairs:
            master.grad = self._host_sums.gradient(names[id(p)]) if p.requires_grad else None

    @torch.no_grad()
    def _step_inner(self) -> None:
        staging = self._host_sums.staging
        for p, master in self._pairs:
            staging.to_host(p, functools.partial(_follow, master.detach().view(-1)))
        staging.settle()
        super()._step_inner()
        for p, master in self._pairs:
            if p.requires_grad:
                staging.to_device(p, master)

    def discard(self) -> None:
        """As :meth:`DPOptimizer.discard`; also what something else has left in the model's ``.grad``."""
        super().discard()
        for p, _ in self._pairs:
            p.grad = None

    def _numbered(self) -> dict[int, nn.Parameter]:
        """The masters, by the numbers that torch gives parameters in a ``state_dict``."""
        everything = [p for group in self.param_groups for p in group["params"]]
        return {number: p for number, p in enumerate(everything) if id(p) in self._originals}

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, and ``"masters"``: float32, by the parameter's number."""
        masters = {number: master.detach() for number, master in self._numbered().items()}
        return {**self.inner.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the inner optimiser's, with the masters.

        Raises:
            ValueError: masters of other parameters.
        """
        loaded, numbered = dict(state_dict), self._numbered()
        masters = loaded.pop("masters", None)
        shapes = {number: list(master.shape) for number, master in numbered.items()}
        if masters is not None and {number: list(master.shape) for number, master in masters.items()} != shapes:
            raise ValueError(
                f"the state has masters of {len(masters)} parameters, which are not the {len(numbered)} of this "
                "optimiser, in number, place or shape. Load the state of the same model and parameter groups."
            )
        loaded["param_groups"] = [{**group, **self._on_host} for group in loaded["param_groups"]]
        super().load_state_dict(loaded)
        for number, master in numbered.items():
            master.copy_(self._originals[id(master)] if masters is None else masters[number])


def _master_like(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32), device="cpu")


def _follow(master: Tensor, start: int, piece: Tensor) -> None:
    """Where the device's value is not the master's, rounded, something else has changed it: take it over."""
    part = master[start : start + piece.numel()]
    same = part.to(piece.dtype) == piece
    if not bool(same.all()):
        part.copy_(torch.where(same, part, piece.to(part.dtype)))


def _exchange(optimizer: torch.optim.Optimizer, by: dict[int, nn.Parameter], options: list[dict[str, Any]]) -> None:
    """Replace parameters, with their state moved to where the new ones are, and options of the groups."""
    state = optimizer.state_dict()  # by number
    for group in optimizer.param_groups:
        group["params"] = [by.get(id(p), p) for p in group["params"]]
    for saved, changed in zip(state["param_groups"], options, strict=True):
        saved.update(changed)
    optimizer.state.clear()
    optimizer.load_state_dict(state)
