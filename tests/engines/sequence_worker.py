"""What one engine does where the tokens of an example are spread over two ranks. ``engine_worker.py`` runs it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dpft
from tests.engines.matrix_worker import TOKENS, Bench, Examples
from tests.engines.models import plain_llama
from tests.engines.verdicts import check_together


class Cropped(Examples):
    """Once it is ``random``, each rank crops an example differently, as a random transformation in a dataset does."""

    random = False

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        first = 1 + dist.get_rank() * self.random
        return {name: value[first : first + 4] for name, value in super().__getitem__(i).items()}


def check_refusals(bench: Bench) -> None:
    """What a forward with its tokens spread over ranks refuses, on all of them, before anything is released."""
    model = plain_llama()
    wrong: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "left padding": lambda b: {**b, "attention_mask": b["attention_mask"].flip(1)},
        "two rows": lambda b: {name: torch.cat([value, value]) for name, value in b.items()},
        "packed": lambda b: {**b, "position_ids": torch.arange(TOKENS)[None] % 3},
        "a value that is not of tokens": lambda b: {**b, "token_type_ids": torch.zeros(1, 2)},
    }
    _, prepared, _, loader = bench.private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), Examples(3), test_seed=1
    )
    batch = next(b for b in loader if 0 < int(b["attention_mask"].sum()) < TOKENS)
    for title, change in wrong.items():
        bench.note(title, raised=raised(lambda change=change: prepared(**change(batch))))
    prepared.eval()
    bench.note("eval mode", raised=raised(lambda: prepared(**batch)))
    with torch.no_grad():
        evaluated = prepared(**batch).loss
        prepared.train()
        bench.note("without gradients", evaluated=float(evaluated), split=float(prepared(**batch).loss))
    loader.privacy.close()
    model, examples = plain_llama(), Cropped(3, tokens=9)
    _, prepared, _, loader = bench.private(model, torch.optim.SGD(model.parameters(), lr=1.0), examples, test_seed=1)
    examples.random = True
    bench.note("different examples", raised=raised(lambda: prepared(**next(iter(loader)))))
    loader.privacy.close()


def raised(act: Callable[[], Any]) -> str:
    try:
        act()
    except dpft.DPFTError as error:
        return str(error)
    return ""


def run_sequence(bench: Bench) -> None:
    """Tokens spread over ranks. Of 7 tokens a rank of two has 4 or 3, and of shorter examples perhaps none."""
    for name, ckpt, tokens in (
        ("llama", False, 96),
        ("tied", "non-reentrant", 96),
        ("lora", "non-reentrant", 96),
        ("grouped", False, 96),
        ("llama", "non-reentrant", TOKENS),
        ("experts", False, TOKENS),
        ("frozen embedding", False, TOKENS),
    ):
        bench.sum(f"{name}, {tokens}", name, "float32", "auto", 5, 1, ckpt, tokens=tokens)
    bench.sum("by length", "llama", "float32", "auto", 5, 1, False, by_length=True)
    bench.sum("an example on fewer ranks than there are", "llama", "float32", "auto", 1, 1, False)
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        bench.note(
            "tiles", raised=raised(lambda: bench.sum("in tiles", "tied", "float32", "auto", 5, 1, False, tiles=3))
        )
    else:
        bench.sum("in tiles", "tied", "float32", "auto", 5, 1, False, tokens=96, tiles=20)
    bench.sum("bf16", "llama", "bf16", "auto", 5, 1, False, tokens=96)
    bench.steps("steps, float32, one_pass", "float32", "one_pass")
    bench.noise("noise, float32", "float32")
    check_together(bench)
    if dist.get_world_size() == bench.sequence:  # one sequence, of which no other rank waits for a refused forward
        check_refusals(bench)


def run(output: Path) -> Bench:
    """All cases."""
    gc.freeze()  # what is imported stays: DeepSpeed collects garbage at every end of an engine
    bench = Bench(output, sequence=2)
    run_sequence(bench)
    bench.write(dist.get_rank())
    return bench
