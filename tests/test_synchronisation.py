"""Reads of the device's values, which a GPU would have to be waited for: none in a forward or backward but plain's.

On a CPU nothing waits, so they are counted by the operations that make them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dpft
from tests import zoo
from tests.training import Training, examples

READS = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "bincount", "histc", "allclose",
)  # fmt: skip
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # by a mask: its number of trues must be known


class _Lists(TorchFunctionMode):
    """Transfers that are no operation of the dispatcher on a CPU."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Counts the operations whose result the host must see before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._lists = _Lists(self.seen)

    def __enter__(self) -> Any:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if name in INDEXED else []
        if name in READS or masks:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_reads_are_seen() -> None:
    with Reads() as reads:
        bool(torch.ones(()) > 0)
        torch.ones(3).tolist()
        torch.equal(torch.ones(2), torch.ones(2))
        torch.ones(2).nonzero()
        torch.ones(2)[torch.ones(2) > 0]
        torch.ones(2).repeat_interleave(torch.tensor([1, 2]))
        torch.ones(2)[torch.ones(2) > 0] = 0
    assert sum(reads.seen.values()) >= 7


def reads_of(model: Any, batch: dict[str, Any]) -> Counter[str]:
    with Reads() as reads:
        model(**batch).loss.backward()
    return reads.seen


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2], ids=str)
def test_backward_reads_nothing(
    entry: zoo.Entry, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what a GPU runs, which on a CPU gives the same sums; also with padding rows.

    At backward 1, 2, 4, 8, ... the isolation checks read: that by gradients once; that by values the row's mask, the
    host's random states, and what a forward of the model reads.
    """
    monkeypatch.setattr("dpft.kernels.impl.simulated_gpu", True)
    plain = reads_of(entry.build(), entry.batch())
    training = Training(
        tmp_path / "ledger.jsonl",
        model=entry.build(),
        dataset=examples(tokens=9),
        strategy=strategy,
        static_shapes=True,
        changes={"num_steps": 6},
    )
    counts = []
    for number, batch in enumerate(training.loader, start=1):
        with Reads() as reads:
            training.backward(batch)
        examples_each = batch["input_ids"].shape[0] if strategy == "per_example" else 1
        counts.append((number, sum(reads.seen.values()) - examples_each * sum(plain.values())))
        training.optimizer.step()
        training.optimizer.zero_grad()
    training.close()
    powers = {1, 2, 4, 8, 16, 32}
    assert len(counts) > 8
    checks = 1 + 2 + sum(plain.values())
    assert all(extra <= checks * (number in powers) for number, extra in counts), counts


def test_a_release_reads_once(tmp_path: Path) -> None:
    """The deferred checks of a whole logical batch come over in one transfer."""
    training = Training(tmp_path / "ledger.jsonl", strategy="two_pass", changes={"noise_multiplier": 0.5})
    transfers = []
    for batch in training.loader:
        training.backward(batch)
        with Reads() as reads:
            training.optimizer.step()
        if training.loader.is_last:
            transfers.append(sum(reads.seen.values()))
        training.optimizer.zero_grad()
    training.close()
    assert transfers == [1] * 3


def test_without_a_loop_checks_are_read_at_once() -> None:
    """Where nobody reads deferred checks before a release, two-pass reads its own."""
    model = dpft.wrap(zoo.LLAMA.build(), strategy="two_pass")
    for _ in range(2):
        model(**zoo.LLAMA.batch()).loss.backward()
    with Reads() as reads:
        model(**zoo.LLAMA.batch()).loss.backward()
    assert sum(reads.seen.values()) >= 1
