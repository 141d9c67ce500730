"""The state of a wrapped model: its clip rule, its parameters, the running pass; and the engine interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dpft.clipping.clip_groups import ClipGroups
from dpft.clipping.deferred_checks import DeferredChecks
from dpft.clipping.factors import ClipCount, ClipRule
from dpft.clipping.passes import BookKeeping, Trace
from dpft.clipping.spread import Spread
from dpft.clipping.strategy_choice import Choice, Strategy, choose_strategy
from dpft.errors import WrapError
from dpft.kernels.impl import Impl
from dpft.rules.base import MatrixUse, Pass
from dpft.rules.groups import Groups

Isolation = Literal["every_step", "default", "off"]
Clipping = Literal["flash", "ghost", "fast", "per_sample", "none"]


class Split(Protocol):
    """Where the tokens of an example are spread over ranks (sequence parallelism)."""

    def split(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """A forward's arguments for this rank's tokens, and the share ``[1]`` of the example's predicted tokens that
        these are; None without labels. A collective of the ranks of the example."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks of the example. A collective."""
        ...


class Engine(Protocol):
    """What the clipped backward needs from an engine, which has the clipped sums instead of ``.grad``."""

    alone: bool
    """Whether one process trains the whole model, and only its sums are elsewhere."""

    @property
    def spread(self) -> Spread | None:
        """Sums the parts of an example's gradient, where its tokens are spread over ranks; None: one has them all."""
        ...

    @property
    def sequence(self) -> Split | None:
        """Splits the tokens, where they are."""
        ...

    sharded: bool
    """Whether parameters are sharded between their uses, so that each traversal of the graph is a collective."""

    gathers_by_call: bool
    """Whether every call of a module with parameters is a collective, so that all ranks must make the same calls."""

    reentrant: bool
    """Whether it supports a backward that runs every parameter's hooks, which reentrant checkpointing cannot avoid."""

    max_batch_size: int
    """Rows of the largest physical batch on any rank, on which the decisions of all ranks are based."""

    def add(self, name: str, grad: Tensor) -> None:
        """Add this rank's part of the clipped sum of a parameter: the full shape, float32 or float64. A collective."""
        ...

    def settle(self) -> None:
        """Called when a backward has handed over all its gradients: none of them may be kept for the next one."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank. A collective."""
        ...

    def pick(self, count: int) -> int:
        """A random number below ``count``, the same on all ranks. A collective."""
        ...

    def same_everywhere(self, words: str) -> bool:
        """Whether all ranks pass the same ``words``, as they must to run the same collectives. A collective."""
        ...

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        """See :class:`dpft.rules.base.Host`."""
        ...

    def rewind(self) -> Callable[[], None]:
        """Called before the first traversal of a graph; the function returned is called before each further one."""
        ...

    def leaves(self) -> dict[str, Tensor]:
        """By name, the autograd leaves that a forward uses instead of the parameters. A collective."""
        ...


class Head(Protocol):
    """The head of a causal LM that computes its losses in chunks."""

    def expecting(self, labels: Any, shifted: bool = False) -> AbstractContextManager[None]:
        """A context in which the head's forward computes its losses with these labels, perhaps shifted already."""
        ...


@dataclass(frozen=True)
class ClipStats:
    """Norms and factors of the last clipped backward. They depend on private data: do not publish them.

    Attributes:
        norms: ``[B]`` float32, each example's gradient norm, or, of products in 16 bits, a bound up to 0.4 % above it;
            0 for a padding row.
        clip_factors: ``[B]`` float32, the factor of each gradient; 0 where the norm was not finite. With
            ``clip_groups`` the smallest factor of its groups.
        example_weights: ``[B]`` float32, 0 for padding rows.
        strategy: the strategy that ran.
    """

    norms: Tensor
    clip_factors: Tensor
    example_weights: Tensor
    strategy: str


@dataclass
class ClipState:
    """State of one wrapped model; lives on the model as ``_dpft_state``.

    Attributes:
        clipping: the mode.
        strategy: as requested; ``"auto"`` is decided per batch shape.
        one_by_one: why ``"auto"`` has become ``"per_example"``; None if it has not.
        generic: whether a rule finds only in a forward whether it covers what the model does.
        rule: the clip function with C.
        memory: bytes that one-pass may keep beyond one gradient; None depends on the device's free memory.
        uses: the trainable matrices, one entry per module that uses one.
        parameters: trainable parameters by canonical name, as they were when last registered.
        impl: of the norm kernels of linear layers.
        flattening: names of parameters whose layers were given ``[B * T, ...]``.
        backwards: number of clipped backward passes so far.
        broken: one of them failed midway, so ``.grad`` may hold a partial sum; reset when a new loop begins.
        unfinished: the last one did.
        weights: ``[B]`` example weights that the last forward without labels was given.
        weights_used: a clipped loss has taken them: the next forward's may be others.
        groups: the rows of each example in the last forward, if it has several; taken by the next clip boundary.
        deferred_checks: flags computed on the device in this logical batch, read once before its release.
        isolation: how often a row is run alone: see :func:`dpft.wrap`.
        isolated_at: the number of the last backward whose forward was checked so.
        isolations: how many forwards were.
        probed_at: the number of the last one before which the isolation check came to a result.
        delivering: address and version of the clipped gradients that autograd is about to accumulate, by parameter.
        guarded: ``id`` of each parameter that has a hook.
        row_tokens: T of the input of the last forward, in each of its rows.
        input_dim: number of dimensions of the model's input in the running forward.
        engine: receives the clipped sums, if several processes train, or they are in host memory; None leaves them in
            ``.grad``.
        decided: the strategy of every batch, if all ranks had to agree on one beforehand.
        head: computes a causal LM's losses in chunks; None if the model's own head and loss are used.
        catches_losses: whether the losses that the model's forward computes of a batch must be caught and computed per
            example; not where its loss function was replaced.
        clip_groups: the groups of parameters that are clipped apart; None: all together.
        count: counts the examples whose norm is at most C, where the clip norm adapts; None elsewhere.
        holds: returns the tensors kept by the running clipped backward; None while none is running.
    """

    clipping: Clipping
    strategy: Strategy | Literal["auto"]
    rule: ClipRule
    memory: int | None
    uses: list[MatrixUse]
    parameters: dict[str, nn.Parameter]
    flattening: set[str] = field(default_factory=set)
    impl: Impl = "auto"
    tap: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    active: Pass | None = None
    batch_size: int | None = None
    seq_len: int = 1
    row_tokens: int = 1
    trace: Trace = field(default_factory=Trace)
    shared: set[str] = field(default_factory=set)
    isolation: Isolation = "default"
    isolated_at: int = 0
    isolations: int = 0
    probed_at: int = 0
    delivering: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    guarded: dict[str, int] = field(default_factory=dict)
    input_dim: int = 1
    choices: dict[tuple[int, int], Choice] = field(default_factory=dict)
    last: ClipStats | None = None
    backwards: int = 0
    broken: bool = False
    unfinished: bool = False
    deferred_checks: DeferredChecks = field(default_factory=DeferredChecks)
    weights: Tensor | None = None
    weights_used: bool = False
    groups: Groups | None = None
    one_by_one: str | None = None
    generic: bool = False
    engine: Engine | None = None
    decided: Choice | None = None
    head: Head | None = None
    catches_losses: bool = True
    holds: Callable[[], BookKeeping] | None = None
    count: ClipCount | None = None
    clip_groups: ClipGroups | None = None

    @property
    def alone(self) -> bool:
        """Whether one process trains the model: what it does, it need not agree on with others."""
        return self.engine is None or self.engine.alone

    def factors(self, sq_norms: Tensor, weights: Tensor) -> Tensor:
        """Clip factors ``[B]`` float64 from squared norms and example weights; counts them where C adapts."""
        if self.count is not None:
            self.count.add(sq_norms, weights, self.rule.max_grad_norm)
        return self.rule.factors(sq_norms, weights)

    def group_factors(self, sq_norms: Tensor, weights: Tensor, group: int) -> Tensor:
        """As :meth:`factors`, of the gradients of one group alone, with its share of C."""
        assert self.clip_groups is not None and self.count is None
        share = self.rule.max_grad_norm * self.clip_groups.shares[group]
        return replace(self.rule, max_grad_norm=share).factors(sq_norms, weights)

    def largest_batch(self, batch_size: int) -> int:
        """The batch size by which it is decided what runs: this batch's, or the largest of all ranks'."""
        return batch_size if self.engine is None or self.engine.alone else self.engine.max_batch_size

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        """See :class:`dpft.rules.base.Host`."""
        return nullcontext() if self.engine is None else self.engine.hold(weight)

    def record_use(self, key: str, ids: Tensor | None = None) -> None:
        """See :class:`dpft.rules.base.Host`. A recomputed forward is not a second use."""
        if self.active is not None:
            return
        self.trace.uses[key] += 1
        if ids is not None:
            self.trace.ids[key] = ids

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """A context in which uses are not recorded as those of the running forward."""
        trace, self.trace = self.trace, Trace()
        try:
            yield
        finally:
            self.trace = trace

    def book_keeping(self) -> BookKeeping:
        """See :func:`dpft.book_keeping`."""
        held = BookKeeping() if self.holds is None else self.holds()
        last = [] if self.last is None else [self.last.norms, self.last.clip_factors, self.last.example_weights]
        return BookKeeping([*held.norms, *last], held.kept)

    def begin(self, shape: torch.Size, row_tokens: int, groups: Groups | None = None) -> None:
        """Start a forward of the whole model, on an input of this shape, whose examples may have several rows."""
        self.batch_size, self.seq_len, self.input_dim = shape[0], shape[1] if len(shape) > 1 else 1, len(shape)
        self.groups, self.row_tokens = groups, row_tokens
        if groups is not None:
            self.batch_size, self.seq_len = groups.rows, self.seq_len * groups.most

    def end(self) -> None:
        """End the forward; a layer that is called on its own later is not part of it."""
        self.batch_size = None

    def run_one_by_one(self, why: str) -> None:
        """From now on, process one example at a time: it is exact for any architecture."""
        self.strategy, self.one_by_one, self.decided = "per_example", why, None
        self.take_trace()

    def take_trace(self) -> Trace:
        """The uses since the last clip boundary; the next forward starts with an empty trace."""
        trace, self.trace = self.trace, Trace()
        return trace

    def check_parameters(self, model: nn.Module, at_rest: bool = False) -> None:
        """Refuse a model whose trainable parameters are not the ones that were covered.

        Args:
            model: the wrapped model.
            at_rest: no forward or backward is running. During one a sharding engine replaces its shards by whole
                parameters, so that only their names can be compared.

        Raises:
            WrapError: names each parameter that was replaced, added, frozen or unfrozen since.
        """
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.engine is not None and self.engine.sharded and not at_rest:
            now: dict[Any, str] = {name: name for name in found}
            then: dict[Any, str] = {name: name for name in self.parameters}
        else:
            now = {id(p): name for name, p in found.items()}
            then = {id(p): name for name, p in self.parameters.items()}
        if now.keys() == then.keys():
            return
        added = sorted(name for i, name in now.items() if i not in then)
        gone = sorted(name for i, name in then.items() if i not in now)
        raise WrapError(
            "the trainable parameters are not the ones that dpft.wrap covered. New or replaced: "
            f"{added or 'none'}; removed, frozen or replaced: {gone or 'none'}. An optimiser that holds the old "
            "ones would train on nothing while epsilon is spent. Call dpft.unwrap(model), finish changing the model "
            "(PEFT, device moves that re-create parameters, freezing), then wrap again and create a new optimiser."
        )

    def choose(self, device: torch.device, batch_size: int, seq_len: int) -> Choice:
        """The strategy for a batch of ``batch_size`` examples of ``seq_len`` tokens."""
        if self.decided is not None:
            return self.decided
        if self.one_by_one is not None:
            return Choice(
                "per_example", f"per_example: one example at a time, as in plain training. {self.one_by_one}"
            )
        if self.strategy != "auto":
            return Choice(self.strategy, f"{self.strategy}: requested")
        shape = (batch_size, seq_len)
        if shape not in self.choices:
            itemsize = max((p.element_size() for p in self.parameters.values()), default=4)
            self.choices[shape] = choose_strategy(
                self.uses, batch_size, seq_len, itemsize, self.memory, device, sums_elsewhere=self.engine is not None
            )
        return self.choices[shape]
