"""Peak memory and FLOPs of one step on a long text, plain and private, with `dpft.long_context` or without. On a CPU.

    python tools/measure_long_context.py --json docs/benchmarks/long_context_cpu.json
    python tools/measure_long_context.py --tokens 2048 --cases plain plain_long one_pass_long

A Llama of random weights, float32, one text of random tokens, gradient checkpointing throughout; each case in the same
process, one after the other. `plain` is Hugging Face's own step with all logits; `plain_long` has dpft's chunked head
(`clipping="none"`) and `dpft.long_context`; `one_pass_long` is the private step with it.

The peak is that of torch's allocator, by every event of its profiler, above the parameters: what an operation takes
inside itself counts. The inputs of checkpoints are copied to memory that is not the allocator's, as a GPU's are to its
host's; these bytes are `host`. Nothing is timed, so a busy machine does no harm.
"""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

import torch
import transformers as hf
from torch import Tensor, nn

import dpft
from dpft.long_context.install import install
from dpft.long_context.offload import HOST, HostCopies, Offloader
from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.common.meter import MIB, Meter
from tools.memory.allocator import CpuAllocator

CASES = ("plain", "plain_long", "one_pass", "one_pass_long", "two_pass_long")


class CountedOffloader(Offloader):
    """Copies to other memory of the CPU, and knows how much of it there was at most."""

    def __init__(self) -> None:
        super().__init__(self._copy)
        self.peak = 0

    def _copy(self, t: Tensor) -> HostCopies:
        made = HostCopies(t)
        self.peak = max(self.peak, sum(HOST.values()))
        return made


def build(args: Any) -> nn.Module:
    """The same model every time."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=args.tokens,
        use_cache=False,
        tie_word_embeddings=args.tied,
    )
    return hf.LlamaForCausalLM(config).train()


def prepared(case: str, args: Any) -> tuple[nn.Module, CountedOffloader | None]:
    """The model of a case."""
    model: Any = build(args)
    offloader = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    strategy: Any
    strategy, long = case.removesuffix("_long"), case.endswith("_long")
    if long:
        offloader = CountedOffloader()
        install(model, "auto", offloader)
    if strategy != "plain":
        dpft.wrap(model, strategy=strategy)
    elif long:
        dpft.wrap(model, clipping="none", loss_chunk=256)  # as many as "auto" takes on a CPU
    return model, offloader


def measure(case: str, args: Any) -> dict[str, Any]:
    """Peak above the parameters, FLOPs, and bytes on the host, of one step."""
    model, offloader = prepared(case, args)
    ids = torch.randint(0, args.vocab, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    short = ids[:, :16]
    model(input_ids=short, labels=short).loss.backward()  # what is made once
    model.zero_grad(set_to_none=True)
    gc.collect()
    allocator, counter = CpuAllocator(), Meter([*model.parameters(), *model.buffers(), ids])
    with allocator.running():
        allocator.mark()
        with counter:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        allocator.mark()
    allocator.finish(base=0)
    height = allocator.readings[0].height
    assert height is not None
    return {
        "case": case,
        "loss": float(loss.detach()),
        "peak": height.total,
        "peak_between_operations": counter.peak - (offloader.peak if offloader is not None else 0),
        "host": 0 if offloader is None else offloader.peak,
        "flops": counter.flops,
    }


def main(description: str | None, arguments: list[str] | None = None) -> None:
    """Read the command line and measure every case."""
    parser = Parser("measure_long_context", description)
    for name, value in (("width", 512), ("layers", 4), ("vocab", 32000), ("tokens", 16384), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    made = []
    for case in args.cases:
        say(case)
        made.append(measure(case, args))
    by = {row["case"]: row for row in made}
    print(f"{'':15} peak MiB   host MiB  of plain  of plain_long   FLOPs of plain_long")
    for row in made:
        for base in ("plain", "plain_long"):
            if base in by:
                row[f"peak_of_{base}"] = row["peak"] / by[base]["peak"]
                row[f"flops_of_{base}"] = row["flops"] / by[base]["flops"]
        ratios = [
            row.get(name, float("nan")) for name in ("peak_of_plain", "peak_of_plain_long", "flops_of_plain_long")
        ]
        numbers = f"{row['peak'] / MIB:9.1f}  {row['host'] / MIB:9.1f}"
        print(f"{row['case']:15}{numbers}  {ratios[0]:8.3f}  {ratios[1]:13.3f}  {ratios[2]:20.4f}")
    if args.json:
        shapes = {name: getattr(args, name) for name in ("width", "layers", "vocab", "tokens", "tied")}
        write_json(args.json, {"shapes": shapes, "conditions": conditions(args.threads), "results": made})


if __name__ == "__main__":
    main(__doc__)
