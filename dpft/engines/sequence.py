"""Sequence parallelism: the tokens of one example are spread over the ranks of a group.

World rank r of W is member r mod S of sequence group r div S: groups are S neighbouring ranks, as Accelerate and
DeepSpeed number them. The members of a group draw the same examples, hold the same parameters as under their engine
alone, and each computes a part of every gradient: that of its own tokens. Norms of parts do not add up, so the parts
are summed **before** the norm is taken:

1. within the group each gradient is reduce-scattered: member s receives the elements that any rank r with r mod S = s
   will update (:meth:`SpreadSums.share`);
2. it squares these, and the group adds up one number for each example;
3. clipped, they are reduced to their owners, over the W / S ranks of the same place s (:meth:`SpreadSums.add_share`).

Both steps together send (W - 1) / W of the gradient's bytes, as one reduce-scatter over all ranks does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpft.engines.ranks import Ranks
from dpft.engines.sums import ClippedSums
from dpft.errors import EngineError, MissingPackageError
from dpft.models.head import IGNORE_INDEX

_TOKENS = ("input_ids", "inputs_embeds")


def sequence_size(accelerator: Any) -> int:
    """S, over how many ranks Accelerate's configuration spreads the tokens of an example; 1: none are spread."""
    return getattr(getattr(accelerator.state, "parallelism_config", None), "sp_size", 1) or 1


def use_ulysses(accelerator: Any, model: nn.Module) -> None:
    """FSDP2: let the model's attention be DeepSpeed's Ulysses, which Accelerate itself does under DeepSpeed only.

    Before attention a rank's tokens of all heads are exchanged for all tokens of its share of the heads.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
    """
    try:
        from deepspeed import comm
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    except ImportError as error:
        raise MissingPackageError(
            "sp_size needs DeepSpeed's Ulysses attention, also under FSDP2: pip install 'dpft[deepspeed]'"
        ) from error
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    handler = accelerator.state.parallelism_config.sp_handler
    UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation=handler.sp_attn_implementation,
        sequence_parallel_size=sequence_size(accelerator),
        micro_batch_size=1,
        disable_in_eval=True,
    )


class SequenceGroup:
    """The ranks among which the tokens of an example are split, and those with the same place in other groups.

    Args:
        ranks: all processes.
        size: S, of the group; it divides their number.
    """

    def __init__(self, ranks: Ranks, size: int) -> None:
        self.ranks, self.size = ranks, size
        self.place, self.data_rank, self.data_world = ranks.rank % size, ranks.rank // size, ranks.world // size
        # Every rank makes every group, as torch requires.
        rows = [list(range(start, start + size)) for start in range(0, ranks.world, size)]
        columns = [list(range(place, ranks.world, size)) for place in range(size)]
        made = [[dist.new_group(members) for members in kind] for kind in (rows, columns)]
        self.group, self.data_group = made[0][self.data_rank], made[1][self.place]

    def total(self, values: Tensor) -> Tensor:
        """The sum of all members' values, the same on each of them."""
        summed = values.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def split(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """This rank's tokens of the example that all members were given.

        Args:
            kwargs: of the model's forward, with one row: ``input_ids [1, T]``, ``labels``, ``attention_mask``.

        Returns:
            The arguments for ``T / S`` tokens, T rounded up with padding, with ``position_ids`` and the labels shifted
            already; and ``[1]`` float32, the share of the example's predicted tokens that are among them: the mean
            loss over them, times this, is the rank's part of the example's loss. None without labels.

        Raises:
            EngineError: arguments that cannot be split, or that differ between the members.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        tokens = next((kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), Tensor)), None)
        if tokens is None or tokens.dim() not in (2, 3) or len(tokens) != 1:
            got = None if tokens is None else list(tokens.shape)
            raise EngineError(
                f"under sequence parallelism a forward takes one example of one row: input_ids or inputs_embeds "
                f"[1, T] by keyword, and got {got}. Set max_physical_batch_size=1."
            )
        length = _without_padding(kwargs.pop("attention_mask", None), tokens.shape[1])
        if (positions := kwargs.pop("position_ids", None)) is not None and not _count_up(positions[:, :length]):
            raise EngineError(
                "position_ids do not count up from 0: documents packed into one row attend to each other under "
                "sequence parallelism. Pass one document as one example, without position_ids."
            )
        part = -(-length // self.size)
        padding = part * self.size - length
        mine = slice(self.place * part, (self.place + 1) * part)
        labels = kwargs.pop("labels", None)
        given: dict[str, Any] = {}
        weight: Tensor | None = None
        marks = [length]
        for name, value in kwargs.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                given[name] = value
            elif value.shape[:2] == tokens.shape[:2]:
                cut = value[:, :length]
                marks += _marks(cut)
                given[name] = F.pad(cut, (0, 0) * (value.dim() - 2) + (0, padding))[:, mine]
            else:
                raise EngineError(
                    f"{name!r} of shape {list(value.shape)} is not one value for each of {tokens.shape[1]} tokens; it "
                    "cannot be split over the ranks of a sequence. Leave it out, or train without sp_size."
                )
        given["position_ids"] = torch.arange(part * self.size, device=tokens.device)[None, mine]
        if labels is not None:
            targets = F.pad(labels[:, 1:length], (0, 1 + padding), value=IGNORE_INDEX)
            marks += _marks(targets)
            of_all = (targets != IGNORE_INDEX).sum(1)
            targets = targets[:, mine].contiguous()
            given["labels"] = given["shift_labels"] = targets
            weight = ((targets != IGNORE_INDEX).sum(1) / of_all.clamp(min=1)).float()
        self._check_same(marks)
        return given, weight

    def _check_same(self, marks: list[int]) -> None:
        """Refuse members that hold different examples: the parts of their gradients would be added up.

        Raises:
            EngineError: on all members.
        """
        both = torch.tensor([*marks, *(-mark for mark in marks)], dtype=torch.int64, device=self.ranks.device)
        count = torch.tensor([len(both), -len(both)], dtype=torch.int64, device=self.ranks.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=self.group)
        if int(count[0]) == -int(count[1]):
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        if int(count[0]) != -int(count[1]) or bool((both[: len(marks)] != -both[len(marks) :]).any()):
            raise EngineError(
                "the ranks of one sequence were given different examples. Take the batches from dpft's loader, and "
                "remove what is random in the dataset or in collate_fn (cropping, masking)."
            )


def _without_padding(mask: Any, length: int) -> int:
    """Number of tokens before the padding on the right.

    Raises:
        EngineError: another kind of mask.
    """
    if mask is None:
        return length
    real = int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == (1, length) else -1
    if real < 1 or bool((mask[0, :real] != 1).any()):
        raise EngineError(
            f"attention_mask {list(getattr(mask, 'shape', []))} is not [1, {length}] with ones before zeros: under "
            "sequence parallelism there is no mask. Pad on the right (tokenizer.padding_side = 'right')."
        )
    return real


def _count_up(positions: Tensor) -> bool:
    return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())


def _marks(values: Tensor) -> list[int]:
    """Two numbers that differ, but for one case in 2^60, where the values or their order do."""
    bits = values.reshape(-1).contiguous()
    if bits.is_floating_point():
        bits = bits.float().view(torch.int32)
    bits = bits.long() + 1
    at = torch.arange(1, len(bits) + 1, device=bits.device)
    # Wraps around at 2^64, which is part of the hash.
    one = (bits * 0x9E3779B97F4A7C1 * (2 * at + 1)).sum()
    two = ((bits ^ (at * 0x2545F4914F6CDD1D)) * 0x369DEA0F31A53F85).sum()
    return [int(one) >> 2, int(two) >> 2]


class SpreadSums:
    """Gradients of examples whose tokens are spread: parts are summed before the norm, and clipped sums after it.

    Args:
        sums: of the engine: sharded over all ranks.
        sequence: the group.
    """

    def __init__(self, sums: ClippedSums, sequence: SequenceGroup) -> None:
        self._sums, self._sequence = sums, sequence
        sums.spread = True

    def total(self, values: Tensor) -> Tensor:
        """See :meth:`SequenceGroup.total`."""
        return self._sequence.total(values)

    def same_everywhere(self, words: str) -> bool:
        """Whether all ranks pass the same ``words``. A collective."""
        return self._sequence.ranks.same(words)

    def share(self, name: str, grad: Tensor) -> Callable[[], Tensor]:
        """Sum the group's parts of one example's gradient, of which this rank keeps its share.

        Args:
            name: of the parameter.
            grad: the whole shape, float32 or float64; given up by the caller.

        Returns:
            A function that waits, and returns the share: one dimension, elements of the sum, each at exactly one
            member of the group, and zeros.
        """
        self._sums.check_new(name, grad)
        group, place, size = self._sequence.group, self._sequence.place, self._sequence.size
        flat = grad.reshape(-1)
        part = self._sums.equal_parts(name)
        if part is not None:
            whole = F.pad(flat, (0, part * self._sequence.ranks.world - len(flat)))
            # [owner's group, owner's place, part] -> [place, group, part]
            sent = whole.view(-1, size, part).transpose(0, 1).reshape(-1)
            own = sent.new_empty(len(sent) // size)
            work = dist.reduce_scatter_tensor(own, sent, group=group, async_op=True)

            def arrived() -> Tensor:
                work.wait()
                return own

            return arrived
        mine, works = [], []
        for piece in self._sums.pieces(name):
            sent = flat[piece.start : piece.start + piece.numel].contiguous()
            works.append(dist.reduce(sent, group=group, group_dst=piece.rank % size, async_op=True))
            if piece.rank % size == place:
                mine.append(sent)

        def all_arrived() -> Tensor:
            for work in works:
                work.wait()
            return torch.cat(mine) if mine else flat[:0].clone()

        return all_arrived

    def add_share(self, name: str, share: Tensor | None) -> None:
        """Add a clipped share to the sums of its owners. A collective; None: this group has no gradient of it."""
        group, place, size = self._sequence.data_group, self._sequence.place, self._sequence.size
        part = self._sums.equal_parts(name)
        pieces = [] if part is not None else [p for p in self._sums.pieces(name) if p.rank % size == place]
        length = sum(p.numel for p in pieces) if part is None else part * self._sequence.data_world
        if share is None:
            share = torch.zeros(length, device=self._sequence.ranks.device)
        if part is not None:
            own = share.new_empty(part)
            work = dist.reduce_scatter_tensor(own, share, group=group, async_op=True)
            self._sums.later(work, lambda: self._sums.accumulate(name, own))
            return
        start = 0
        for piece in pieces:
            sent = share[start : start + piece.numel].contiguous()
            start += piece.numel
            work = dist.reduce(sent, group=group, group_dst=piece.rank // size, async_op=True)
            mine = piece.rank == self._sequence.ranks.rank
            self._sums.later(work, functools.partial(self._sums.accumulate, name, sent) if mine else _nothing)


def _nothing() -> None:
    pass


def check_spread(sequence: SequenceGroup, model: nn.Module) -> None:
    """Refuse a model that computes something else with its tokens split over ranks. A collective.

    One random text is run whole, on every rank, and split: logits and loss must be the same. An attention with a
    window or in chunks is refused by its configuration, as the text is short.

    Args:
        sequence: the group.
        model: wrapped and prepared; in eval mode each rank runs a whole text by itself.

    Raises:
        EngineError: on all ranks.
    """
    device, vocabulary = sequence.ranks.device, model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # a method of every model of transformers
    ids = torch.randint(0, vocabulary, (1, 4 * sequence.size + 3), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    training, dropouts = model.training, _without_dropout(model)
    try:
        with torch.no_grad():
            model.eval()
            whole, loss = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
            model.train()
            mine, split_loss = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
    finally:
        for module, name, value in dropouts:
            setattr(module, name, value)
        model.train(training)
        for module in model.modules():
            getattr(module, "reshard", lambda: None)()  # FSDP2 leaves the root's parameters whole until a backward
    part = mine.shape[1]
    start = sequence.place * part
    here = whole[:, start : start + part]
    narrow = mine.dtype.itemsize < 4 or any(p.dtype.itemsize < 4 for p in model.parameters())
    tolerance = 5e-2 if narrow else 1e-3
    apart = (mine[:, : here.shape[1]] - here).abs().amax() > tolerance * whole.abs().amax()
    wrong = bool(apart) or bool((loss - split_loss).abs() > tolerance * loss.abs())
    if sequence.ranks.any(wrong, "the check of the split"):
        raise EngineError(
            "the model computes something else when its tokens are split over ranks: a layer besides attention mixes "
            "tokens (a convolution, a recurrent state), or its attention is not the one that sp_attn_implementation "
            "names. Train it without sp_size."
        )


def _without_dropout(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Sets every dropout of the model to 0; what they were."""
    before: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            rate = (isinstance(module, nn.Dropout) and name == "p") or "dropout" in name
            if rate and isinstance(value, float) and value > 0:
                before.append((module, name, value))
    for module, name, _ in before:
        setattr(module, name, 0.0)
    return before
