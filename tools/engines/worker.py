"""What measure_engines.py launches: one engine's steps, plain and private, and what each costs a rank.

    accelerate launch --config_file ... engines/worker.py OPTIONS_AS_JSON OUTPUT_FOLDER

Everything is counted where torch dispatches operations, so that an engine, torch and dpft are counted alike.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

import dpft
from accelerate import Accelerator
from dpft.engines.sequence import use_ulysses
from tools.engines.ulysses import forget_ulysses, my_tokens

# The names that torch's operators of collectives begin with, in the order in which they are looked for.
KINDS = {
    "all_gather": ("_allgather_base", "allgather", "all_gather"),
    "reduce_scatter": ("_reduce_scatter_base", "reduce_scatter"),
    "all_reduce": ("allreduce", "all_reduce"),
    "reduce": ("reduce_",),
    "broadcast": ("broadcast",),
    "other": ("alltoall", "all_to_all", "gather", "scatter", "send", "recv"),
}
# Steps before the one that is measured, which is then backward 3, or 9 to 12 of four a step: without the isolation
# check, which runs on backward 1, 2, 4, 8 and 16.
BEFORE = 2
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def use_cpu() -> None:
    """Let the ready configurations run on a CPU, which Accelerate by itself gets wrong without an error.

    As tests/engines/on_cpu.py, which is not for tools to import: gloo, and no extension of DeepSpeed's built. Plain
    data parallelism must know that it is on a CPU: its wrapper would look for a GPU.
    """
    torch.set_num_threads(1)
    zero, fsdp = (os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true" for name in ("DEEPSPEED", "FSDP"))
    gloo = ("gloo", DistributedType.MULTI_GPU if zero or fsdp else DistributedType.MULTI_CPU)
    PartialState._prepare_backend = lambda *_, **__: gloo
    if zero:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def kind_of_collective(name: str) -> str | None:
    """``c10d::allreduce_`` -> ``all_reduce``; None for what sends nothing (wait, barrier, broadcast of nothing)."""
    space, _, operator = name.partition("::")
    if space not in ("c10d", "_c10d_functional"):
        return None
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), None)


def ranks_of(args: Any) -> int:
    """Number of ranks of the group that a collective's arguments name."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
        if isinstance(value, str) and value in _groups():
            return _groups()[value].size()
    raise TypeError(f"no process group among {args}")


def _groups() -> dict[str, dist.ProcessGroup]:
    return {name: group for group, name in dist.distributed_c10d._world.pg_names.items()}


def size(value: Any) -> int:
    """Bytes of the tensors in it."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def attention_flops(func: Any, args: Any) -> int:
    """torch's formulas for attention, for the CPU's kernel, which its table lacks."""
    if func.overloadpacket is ATTENTION:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))


class Meter(TorchDispatchMode):
    """Counts, of this rank and while it is entered, collectives, FLOPs and bytes of live tensors.

    Enter it before the model is made, so that no storage is missed. A storage counts once, with the size that it has:
    FSDP2 empties and refills those of its whole parameters, which are looked at after every operation.

    Attributes:
        calls, payload: by kind of collective; the payload is the larger of what goes in and what comes out, so of an
            all-gather and a reduce-scatter the whole, not the part.
        wire: bytes that a ring of the collective's own n ranks sends from each: 2 (n-1)/n of an all-reduce's payload,
            (n-1)/n of the others'.
        flops: by torch's formulas.
        live, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()
        self.wire = 0.0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}
        self._elastic: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # its own operations come here one by one
        out = func(*args, **kwargs)
        kind = kind_of_collective(func.name())
        if kind is not None:
            self.calls[kind] += 1
            payload, ranks = max(size(part) for part in (*args, out)), ranks_of(args)
            self.payload[kind] += payload
            self.wire += payload * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
        elif func.overloadpacket in (ATTENTION, ATTENTION_BACKWARD):
            self.flops += attention_flops(func, args)
        elif func.overloadpacket in flop_registry:
            self.flops += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        for t in tree_leaves((args, kwargs, out)):
            if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu":
                self._see(t.untyped_storage())
        for key in self._elastic:
            self._measure(key)
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key], self._sizes[key] = weakref.ref(storage), 0
            weakref.finalize(storage, self._died, key)
            self._measure(key)

    def _measure(self, key: int) -> None:
        storage = self._alive[key]()
        if storage is not None:
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()

    def _died(self, key: int) -> None:
        self._elastic.discard(key)
        del self._alive[key]
        self.live -= self._sizes.pop(key)

    def mark(self) -> int:
        """Count anew from here; returns the bytes that are live."""
        gc.collect()
        for key in list(self._alive):
            self._measure(key)
            if self._sizes[key] == 0:
                self._elastic.add(key)
        self.peak, self.flops, self.wire = self.live, 0, 0.0
        self.calls.clear()
        self.payload.clear()
        return self.live


class _Traversal(torch.autograd.Function):
    """The identity; its backward runs once for each traversal of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: list[int]) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.count[0] += 1
        return grads[0], None


class Examples:
    """N random sequences of T tokens."""

    def __init__(self, number: int, tokens: int, vocab: int) -> None:
        self.ids = torch.randint(0, vocab, (number, tokens), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def build(options: dict[str, Any], checkpointing: bool) -> tuple[nn.Module, list[int]]:
    """The model, and where the traversals of its graph are counted."""
    torch.manual_seed(0)
    width = options["width"]
    config = LlamaConfig(
        vocab_size=options["vocab"],
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=options["layers"],
        num_attention_heads=width // 64,
        max_position_embeddings=options["tokens"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    count = [0]
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: _Traversal.apply(out, count))
    return model, count


def make_accelerator(options: dict[str, Any], plain: bool, physical: int) -> Accelerator:
    """Accelerate's state made anew; DeepSpeed's buckets as its "auto" makes them, for a model of this width."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    use_cpu()
    accumulated = physical if plain else 1
    more: dict[str, Any] = {}
    if options["sequence"] > 1:
        world = int(os.environ["WORLD_SIZE"])
        sharded = world if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else world // options["sequence"]
        more["parallelism_config"] = ParallelismConfig(sp_size=options["sequence"], dp_shard_size=sharded)
        more["parallelism_config"].sp_handler.sp_attn_implementation = "sdpa"
        forget_ulysses()
    accelerator = Accelerator(gradient_accumulation_steps=accumulated, **more)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(
            gradient_accumulation_steps=accumulated,
            train_micro_batch_size_per_gpu=options["rows"],
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            steps_per_print=10**9,
        )
        plugin.deepspeed_config["zero_optimization"].update(
            reduce_bucket_size=options["width"] ** 2,
            stage3_prefetch_bucket_size=int(0.9 * options["width"] ** 2),
            stage3_param_persistence_threshold=10 * options["width"],
            # Of a model this small ZeRO-3 would put nothing away between forward and backward.
            stage3_max_live_parameters=0,
            stage3_max_reuse_distance=0,
        )
    return accelerator


def run_plain(options: dict[str, Any], checkpointing: bool, physical: int) -> Generator[Any, None, None]:
    """Training as Accelerate's users know it; yields after each physical batch whether it ended a logical one."""
    model, count = build(options, checkpointing)
    yield count
    accelerator = make_accelerator(options, True, physical)
    if options["sequence"] > 1 and accelerator.state.deepspeed_plugin is None:
        use_ulysses(accelerator, model)  # as Accelerate does under DeepSpeed
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    rows = options["rows"]
    examples = Examples(rows * physical, options["tokens"], options["vocab"])
    while True:
        for i in range(physical):
            batch = torch.stack([examples[k]["input_ids"] for k in range(rows * i, rows * (i + 1))])
            with accelerator.accumulate(model):
                accelerator.backward(model(**my_tokens(batch, options["sequence"])).loss)
                optimizer.step()
                optimizer.zero_grad()
            yield i + 1 == physical


def run_private(
    options: dict[str, Any], checkpointing: bool, physical: int, strategy: Any, ledger: Path
) -> Generator[Any, None, None]:
    """The same, private."""
    model, count = build(options, checkpointing)
    yield count
    accelerator = make_accelerator(options, False, physical)
    number = options["rows"] * physical * accelerator.num_processes // options["sequence"]
    privacy = dpft.PrivacyConfig(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=1.0,
        expected_batch_size=number,
        num_steps=BEFORE + 1,
        target_delta=1e-5,
    )
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        torch.optim.AdamW(model.parameters()),
        Examples(number, options["tokens"], options["vocab"]),
        privacy,
        max_physical_batch_size=options["rows"],
        strategy=strategy,
        ledger_path=ledger,
    )
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        last = loader.is_last
        optimizer.zero_grad()
        yield last
    loader.privacy.close()


def measure(
    options: dict[str, Any], checkpointing: bool, physical: int, strategy: str, ledger: Path
) -> dict[str, Any]:
    """What one step costs this rank, after :data:`BEFORE` others."""
    meter = Meter()
    with meter:
        run = (
            run_plain(options, checkpointing, physical)
            if strategy == "plain"
            else run_private(options, checkpointing, physical, strategy, ledger)
        )
        count = next(run)
        for _ in range(1 if strategy == "plain" else BEFORE):
            while not next(run):
                pass
        rest = meter.mark()
        count[0], between, ended, batches = 0, 0, False, 0
        while not ended:
            ended = next(run)
            batches += 1
            if not ended:
                gc.collect()
                between = meter.live - rest
        facts = {
            "strategy": strategy,
            "checkpointing": checkpointing,
            "physical": batches,
            "calls": dict(meter.calls),
            "bytes": dict(meter.payload),
            "wire": meter.wire,
            "flops": meter.flops,
            "traversals": count[0],
            "rest": rest,
            "peak": meter.peak,
            "held_between": between,
        }
    with contextlib.suppress(StopIteration):
        if strategy != "plain":
            next(run)  # the loop ends, and the ledger is closed
    run.close()
    gc.collect()
    return facts


def check_counter(options: dict[str, Any]) -> None:
    """The counter against a hand count: 1,000 float32 in each kind of collective."""
    world = dist.get_world_size()
    whole, part = torch.zeros(1000 * world), torch.zeros(1000)
    with Meter() as meter:
        dist.all_reduce(part)
        dist.broadcast(part, src=0)
        dist.reduce(part, dst=0)
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather([torch.zeros(1000) for _ in range(world)], part)
        dist.reduce_scatter_tensor(part, whole, async_op=True).wait()
    expected = {"all_reduce": 1, "broadcast": 1, "reduce": 1, "all_gather": 2 * world, "reduce_scatter": world}
    assert meter.payload == {kind: 4000 * times for kind, times in expected.items()}, meter.payload
    twice = sum(expected.values()) + expected["all_reduce"]
    assert abs(meter.wire - 4000 * twice * (world - 1) / world) < 1e-6, meter.wire


def main(options: dict[str, Any], output: Path) -> None:
    results: list[dict[str, Any]] = []
    for case in options["cases"]:
        results.append(measure(options, **case, ledger=output / f"ledger_{len(results)}.jsonl"))
    check_counter(options)
    total = sum(p.numel() for p in build(options, False)[0].parameters())
    written = {"world": dist.get_world_size(), "parameters": total, "results": results}
    (output / f"costs_{dist.get_rank()}.json").write_text(json.dumps(written))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
