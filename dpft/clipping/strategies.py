"""The strategies: from per-example losses ``[B]`` and their graph to the clipped sum of the gradients.

Each runs inside the backward of the clip boundary, as nested backward passes over the graph that the boundary keeps.
Nothing outside can reach a site's backward while a pass runs, and a site that is reached while none runs raises: a
gradient that did not come through here is never taken for a clipped one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpft.clipping.clip_groups import ClipGroups
from dpft.clipping.coverage import check_coverage, count_uses, foreign_leaves, may_accumulate, refuse_strays
from dpft.clipping.factors import row_weights
from dpft.clipping.groupwise import GroupwisePass
from dpft.clipping.one_by_one import no_gradient, run_per_example
from dpft.clipping.passes import KeepPass, NormPass, Trace, WeightedPass, grad_dtype, sum_dtype
from dpft.clipping.probe import ProbePass, Watched, draw_seeds, drew_since, mixed_examples, random_states
from dpft.clipping.spread import Spread, SpreadPass
from dpft.clipping.state import ClipState, ClipStats
from dpft.errors import ClippingError
from dpft.kernels.linear import Method
from dpft.kernels.weighted import RowWeights, none_dropped
from dpft.rules.base import Pass
from dpft.rules.groups import Groups

_METHODS: dict[str, Method | None] = {"flash": None, "ghost": "gram_full", "fast": "materialise"}


@dataclass
class Job:
    """One clipped backward, from the losses of a forward to the gradients.

    Attributes:
        state: of the wrapped model.
        losses: ``[B]`` with their graph, or B of shape ``[]`` with a graph each (per-example strategy).
        weights: ``[B]``, 0 for padding rows.
        strategy: which strategy to run; see :mod:`dpft.clipping.strategy_choice`.
        trace: the matrices that the forward used.
        row_tokens: T of the model's input, in each of its rows.
        groups: the rows of each example, where one has several.
        leaves: by name, the tensors that the forward used instead of parameters that an engine has sharded.
    """

    state: ClipState
    losses: Tensor | Sequence[Tensor]
    weights: Tensor
    strategy: str
    trace: Trace
    row_tokens: int
    groups: Groups | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch_size = len(self.weights)
        self.reentrant = False
        self.uses: Counter[str] = Counter()  # of each parameter in the graph, where that is needed and known
        self.probe: ProbePass | None = None
        self._rewind: Callable[[], None] | None = None

    def run(self, scale: Tensor) -> list[Tensor | None] | None:
        """The weighted gradients of the state's parameters, in their order; None where they are in ``.grad`` already.

        Args:
            scale: ``[]``, the gradient of the boundary's output: a factor of the result, not of the norms.
        """
        try:
            grads = self._run(scale)
        finally:
            self.state.holds = None
        if self.state.engine is not None:
            self.state.engine.settle()
        if grads is not None:
            for name, grad in zip(self.state.parameters, grads, strict=True):
                if grad is not None:
                    self.state.delivering.setdefault(name, []).append((grad.data_ptr(), grad._version))
            # If a backward stops before a parameter, its entry must not let another gradient pass.
            torch.autograd.Variable._execution_engine.queue_callback(self.state.delivering.clear)
        return grads

    def _run(self, scale: Tensor) -> list[Tensor | None] | None:
        if self.strategy == "per_example":
            others = self._others(lambda: any(may_accumulate(loss) for loss in self.losses))
            alone = run_per_example(self, scale)
            refuse_strays(others)
            return alone
        assert isinstance(self.losses, Tensor)
        sharded = self.state.engine is not None and self.state.engine.sharded
        names = None if sharded else {id(p): name for name, p in self.state.parameters.items()}
        self.reentrant = check_coverage(self.losses, names)
        if self.reentrant and self.state.engine is not None and not self.state.engine.reentrant:
            raise ClippingError(
                "gradient checkpointing is reentrant, and DeepSpeed's hooks mistake its backward for the one with "
                "gradients. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if self.state.clip_groups is not None and names is not None and not self.reentrant:
            self.uses = count_uses(self.losses, names)
        self.probe = self._probe()
        others = self._others(lambda: self.reentrant)
        grads = None
        if self.state.engine is not None and self.state.engine.spread is not None:
            run_spread(self, self.state.engine.spread, scale)
        elif self.state.clip_groups is not None:
            grads = run_groupwise(self, self.state.clip_groups, scale)
        elif self.strategy == "one_pass":
            grads = run_one_pass(self, scale)
        else:
            run_two_pass(self, scale)
        refuse_strays(others)
        return grads

    def _others(self, accumulates: Callable[[], bool]) -> dict[int, Any]:
        """Parameters that are not the model's, where one may be given a gradient that nothing has seen.

        As rarely as the isolation check: it looks at every object of the process.
        """
        due = self.state.alone and self.state.backwards & (self.state.backwards - 1) == 0
        return foreign_leaves({id(p): n for n, p in self.state.parameters.items()}) if due and accumulates() else {}

    def traverse(self, running: Pass, losses: Tensor, seeds: Tensor, retain_graph: bool) -> None:
        """One backward pass over the graph, in which the sites report to ``running``."""
        state = self.state
        running.groups, running.row_tokens = self.groups, self.row_tokens
        inputs: list[Tensor] | None = [state.tap]
        if running.weighted and state.engine is None:
            inputs = list(state.parameters.values())
        if self.reentrant:
            inputs = None  # reentrant checkpointing does not support it; only the weighted pass returns gradients
        if self._rewind is not None:
            self._rewind()
        elif state.engine is not None:
            self._rewind = state.engine.rewind()
        previous, state.active = state.active, running
        try:
            torch.autograd.backward(losses, seeds, retain_graph=retain_graph, inputs=inputs)
        finally:
            state.active = previous

    def _probe(self) -> ProbePass | None:
        """The first half of the isolation check: the traversal with other seeds, where one is due.

        One is due at the first batch of more than one example and, for mixing that depends on the data, at backward 2
        and whenever their number is four times that at the last. Such a step keeps the graph, as a two-pass step does.
        """
        state = self.state
        largest = state.largest_batch(self.batch_size)
        rarer = 2 if state.probed_at == 1 else 4
        if largest < 2 or (state.probed_at > 0 and state.backwards < rarer * state.probed_at):
            return None
        assert isinstance(self.losses, Tensor)
        narrow = torch.float16 in {self.losses.dtype, *(p.dtype for p in state.parameters.values())}
        probe = ProbePass(draw_seeds(self.losses, narrow))
        before = random_states(self.losses.device)
        self.traverse(probe, self.losses, probe.seeds, retain_graph=True)
        drew = drew_since(before, self.losses.device)
        if drew if state.engine is None else state.engine.any(drew):
            # A checkpoint that does not restore the random state: only what must be zero is the same every time.
            probe = ProbePass(draw_seeds(self.losses, narrow=True), zeros_only=True)
            self.traverse(probe, self.losses, probe.seeds, retain_graph=True)
        return probe

    def refuse_mixed(self, watched: Watched | None) -> None:
        """The second half: compare what the traversal with unit seeds saw with what the probe saw.

        Raises:
            ClippingError: on all ranks, if the examples of one are mixed.
        """
        state, probe = self.state, self.probe
        if probe is None or watched is None:
            return
        flags, reached_any = mixed_examples(probe, watched)
        # One transfer from the device for all of them.
        read = torch.stack([flag.to(reached_any.device) for flag in (reached_any, *flags.values())]).tolist()
        reached, mixed = read[0], {key for key, flag in zip(flags, read[1:], strict=True) if flag}
        anywhere = bool(mixed)
        if state.engine is not None:  # all ranks continue, or none
            anywhere, reached = state.engine.any(anywhere), state.engine.any(reached)
        if anywhere:
            raise ClippingError(
                f"the loss of one example has a gradient in other examples' rows at "
                f"{sorted(mixed) or 'a layer, on another rank'}: a layer mixes "
                "examples (batch statistics, routing, a sequence-first layout, packed examples), so no bound on one "
                "example's contribution would hold. Make the batch the first dimension of every layer's input and "
                "remove the mixing, or wrap with strategy='per_example', which runs one example at a time. (A "
                "backward that is not linear in its gradient looks the same.)"
            )
        if reached:
            state.probed_at = state.backwards

    def factors(self, sq_norms: Tensor) -> Tensor:
        """``[B]`` float64 clip factors, which also become the model's stats."""
        weights = self.weights.to(sq_norms.device)
        clips = self.state.clipping != "none"
        factors = self.state.factors(sq_norms, weights) if clips else row_weights(weights)
        self.note(sq_norms, factors)
        return factors

    def note(self, sq_norms: Tensor, factors: Tensor) -> None:
        """Squared norms and clip factors ``[B]`` of this backward become the model's stats."""
        self.state.last = ClipStats(
            norms=sq_norms.sqrt().float(),
            clip_factors=factors.float(),
            example_weights=self.weights.to(sq_norms.device).float(),
            strategy=self.strategy,
        )


def run_one_pass(job: Job, scale: Tensor) -> list[Tensor | None] | None:
    """Norms and, per matrix, the tensors for the weighted sum, in one traversal.

    Under an engine gradients are computed and added one at a time, and none is kept afterwards.
    """
    assert isinstance(job.losses, Tensor)
    keep = KeepPass(
        job.batch_size, job.losses.device, "gradients" if job.state.clipping == "per_sample" else "smaller"
    )
    losses, job.losses = job.losses, ()
    job.state.holds = keep.holds
    keep.watched = Watched() if job.probe is not None else None
    job.traverse(keep, losses, torch.ones_like(losses), retain_graph=False)
    job.refuse_mixed(keep.watched)
    keep.finish()
    factors = job.factors(keep.sq) * scale.to(keep.sq)
    keep.scale(factors)
    return _hand_over(job, keep, losses.device)


def _hand_over(job: Job, keep: KeepPass, device: torch.device) -> list[Tensor | None] | None:
    """The weighted gradients, or, under an engine, None after it was given them, one at a time."""
    engine = job.state.engine
    if engine is None:
        return [keep.release(name, p, grad_dtype(p)) for name, p in job.state.parameters.items()]
    for name, p in job.state.parameters.items():
        grad = keep.release(name, p, sum_dtype(p))
        # The sum is a collective: this rank takes part even if it did not use the parameter.
        engine.add(name, no_gradient(p, device) if grad is None else grad)
    return None


def run_groupwise(job: Job, groups: ClipGroups, scale: Tensor) -> list[Tensor | None] | None:
    """Norms, factors and weighted gradients of one group of parameters after the other, in one traversal.

    They go to ``.grad`` at once, unless an engine takes them in its order, the isolation check has to come first, or a
    parameter has hooks, which autograd calls.
    """
    assert isinstance(job.losses, Tensor)
    state, engine = job.state, job.state.engine
    smallest = torch.full((job.batch_size,), torch.inf, dtype=torch.float64, device=job.losses.device)

    def factors(sq: Tensor, group: int) -> Tensor:
        made = state.group_factors(sq, job.weights.to(sq.device), group)
        torch.minimum(smallest, made, out=smallest)
        return made * scale.to(made)

    keep = GroupwisePass(
        job.batch_size,
        job.losses.device,
        "gradients" if state.clipping == "per_sample" else "smaller",
        groups,
        job.uses,
        factors,
        state.parameters,
        grad_dtype if engine is None else sum_dtype,
        _into_grad(state) if engine is None and job.probe is None and not _hooked(state) else None,
    )
    losses, job.losses = job.losses, ()
    state.holds = keep.holds
    keep.watched = Watched() if job.probe is not None else None
    job.traverse(keep, losses, torch.ones_like(losses), retain_graph=False)
    job.refuse_mixed(keep.watched)
    keep.finish()
    job.note(keep.sq, smallest)
    return _hand_over(job, keep, losses.device)


def _hooked(state: ClipState) -> bool:
    """Whether a parameter has hooks besides dpft's, which only see a gradient that autograd delivers."""
    parameters: list[Any] = list(state.parameters.values())
    return any(len(p._backward_hooks or ()) > 1 or p._post_accumulate_grad_hooks for p in parameters)


def _into_grad(state: ClipState) -> Callable[[str, Tensor], None]:
    def deliver(name: str, grad: Tensor) -> None:
        p = state.parameters[name]
        p.grad = grad if p.grad is None else p.grad.add_(grad)

    return deliver


def run_spread(job: Job, spread: Spread, scale: Tensor) -> None:
    """One example whose tokens are spread over ranks: see :mod:`dpft.clipping.spread`."""
    assert isinstance(job.losses, Tensor)
    losses, job.losses = job.losses, ()
    running = SpreadPass(spread, job.trace, losses, job.strategy, job.groups)
    job.state.holds = running.holds
    job.traverse(running, losses, torch.ones_like(losses), retain_graph=False)
    running.finish(job.state.parameters)
    running.release(job.factors(running.sq) * scale.to(running.sq), job.state.parameters)


def run_two_pass(job: Job, scale: Tensor) -> None:
    """Norms in one traversal, then the weighted gradients, accumulated by autograd, in another of the same graph."""
    assert isinstance(job.losses, Tensor)
    state = job.state
    losses, job.losses = job.losses, ()
    seeds = torch.ones_like(losses)
    for _ in range(2):
        norms = NormPass(job.batch_size, losses.device, _METHODS[state.clipping], job.trace, state.shared)
        state.holds = norms.holds
        norms.watched = Watched() if job.probe is not None else None
        job.traverse(norms, losses, seeds, retain_graph=True)
        unresolved = norms.finish()
        words = "\n".join([*norms.order, "", *sorted(unresolved)])
        if state.engine is not None and not state.engine.same_everywhere(words):
            raise ClippingError(
                "the ranks used different parameters, or in a different order (layers dropped at random, a tower that "
                "only some examples use), and two-pass sends gradients in that order. Use strategy='one_pass'."
            )
        if not unresolved:
            break
        state.shared = state.shared | unresolved
    else:
        raise ClippingError(f"the uses of {sorted(unresolved)} changed between two traversals of one graph")
    job.refuse_mixed(norms.watched)
    factors = job.factors(norms.sq) * scale.to(norms.sq)
    # What the second traversal computes again may be infinite where the first was finite.
    weights = RowWeights(factors, none_dropped(factors))
    weighted = WeightedPass(weights, None if state.engine is None else state.engine.add, state.parameters)
    job.traverse(weighted, losses, seeds, retain_graph=False)
    _check_same_gradients(state, norms.seen, weighted.seen, factors)


def _check_same_gradients(state: ClipState, norms: Tensor, weighted: Tensor, factors: Tensor) -> None:
    """Refuse a step whose two traversals saw different gradients or inputs, so that the norms do not bound the sum.

    Args:
        state: whose deferred checks record the result.
        norms: ``[4, B]``, per example the sum over sites of :meth:`~dpft.rules.base.MatrixUse.seen`.
        weighted: the same for the second traversal.
        factors: ``[B]``; examples of factor zero do not count.
    """
    by = (norms - weighted).abs()
    apart = ~((by[:2].amax(0) <= 1e-3 * norms[1]) & (by[2:].amax(0) <= 1e-4 * norms[3]))  # also where one is NaN
    state.deferred_checks.refuse_if(
        (apart & (factors != 0)).any(),
        "the norm pass and the weighted pass saw different gradients or inputs: a recomputed forward differs from the "
        "original (dropout in a checkpoint with preserve_rng_state=False, a random generator of its own). Their "
        "sum is not clipped: drop it. Use preserve_rng_state=True, or strategy='one_pass'.",
    )
