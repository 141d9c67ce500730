"""What one engine does, case by case, against the float64 oracle. ``engine_worker.py`` runs it; it writes JSON.

Weights (``models.py``) are numbers that bf16 holds exactly, so that one oracle serves float32 and bf16.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ParallelismConfig
from torch import Tensor, nn

import dpft
from accelerate import Accelerator
from dpft.engines import sums
from tests import zoo
from tests.engines.models import MODELS, plain_llama
from tests.engines.on_cpu import forget_ulysses, make_accelerator
from tests.engines.verdicts import check_together
from tests.oracle import PerExample, oracle, plain_error, relative_error, trainable

CLIP = 0.5
RATE = 1024.0  # the first step of SGD is then the gradient, to the last bits: the parameters vanish beside it
TOKENS = 7
ADAM = {"lr": 1e-2, "eps": 1e-3}
STEPS = {"examples": 12, "batch": 5, "steps": 5, "seed": 11}


class Examples:
    """N examples of the zoo's token batch, one dictionary each."""

    def __init__(self, number: int, seed: int = 3, tokens: int = TOKENS) -> None:
        self.batch = zoo.token_batch(number, tokens, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.batch.items()}


class Bench:
    """Runs cases in one process of one launch; Accelerate's state is made anew for each.

    Args:
        output: folder for what is judged.
        hybrid: HSDP, two replicas of two shards.
        sequence: over how many ranks the tokens of an example are spread.
    """

    def __init__(self, output: Path, hybrid: bool = False, sequence: int = 1) -> None:
        self.output, self.hybrid, self.offload, self.sequence = output, hybrid, False, sequence
        sums.BUCKET = 3000  # so that a tiny model fills several
        self.results: dict[str, Any] = {}
        self._exact: dict[tuple[str, int, int], PerExample] = {}
        self._plain: dict[tuple[str, int], float] = {}
        self._count = 0
        self.deepspeed = False
        self._last: Any = None

    def forget(self) -> None:
        """Ends what the last case has left, so that an Accelerator can be made anew."""
        if self.deepspeed:
            self._last.destroy()  # its hooks and process groups would stay
        if self.sequence > 1:
            forget_ulysses()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def accelerator(self, precision: str) -> Accelerator:
        self.forget()
        options: dict[str, Any] = {"mixed_precision": "bf16" if precision == "bf16" else "no"}
        if self.hybrid:
            options["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        if self.sequence > 1:
            world = int(os.environ["WORLD_SIZE"])
            sharded = world if os.environ.get("ACCELERATE_USE_FSDP") == "true" else world // self.sequence
            options["parallelism_config"] = ParallelismConfig(sp_size=self.sequence, dp_shard_size=sharded)
        accelerator = make_accelerator(**options)
        if self.offload:
            from torch.distributed.fsdp import CPUOffloadPolicy

            accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning needs a GPU
        plugin = accelerator.state.deepspeed_plugin
        self.deepspeed = plugin is not None
        if plugin is not None:
            plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
            plugin.deepspeed_config["steps_per_print"] = 10**9
            # small enough for the tiny model to be sharded into several pieces
            plugin.deepspeed_config["zero_optimization"].update(
                stage3_param_persistence_threshold=0, sub_group_size=6000
            )
        return accelerator

    def private(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        examples: Examples,
        precision: str = "float32",
        **options: Any,
    ) -> tuple[Accelerator, nn.Module, Any, dpft.PrivateDataLoader]:
        settings = {
            "noise_multiplier": 0.0,
            "max_grad_norm": CLIP,
            "expected_batch_size": len(examples),
            "sample_rate": 1.0,
            "num_steps": 1,
            "target_delta": 1e-5,
        }
        settings.update(options.pop("privacy", {}))
        if self.sequence > 1:
            options["max_physical_batch_size"] = 1
        accelerator = self.accelerator(precision)
        self._count += 1
        options.setdefault("ledger_path", self.output / f"ledger_{self._count}.jsonl")
        prepared = dpft.prepare(
            accelerator,
            model,
            optimizer,
            examples,
            dpft.PrivacyConfig(**settings),
            **options,
        )
        self._last = prepared[0]
        return accelerator, *prepared

    def train(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any) -> list[int]:
        """Runs the loop; the number of physical batches of each logical one."""
        counts = [0]
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            counts[-1] += 1
            if loader.is_last:
                counts.append(0)
        loader.privacy.close()
        return counts[:-1]

    def exact(self, name: str, number: int, tokens: int = TOKENS) -> PerExample:
        key = (name, number, tokens)
        if key not in self._exact:
            model: Any = MODELS[name]()
            if name == "experts":
                model.set_experts_implementation("eager")  # the other refuses float64
            if self.sequence > 1:
                model.set_attn_implementation("eager")  # the other exchanges tokens with the other ranks
            self._exact[key] = oracle(model, Examples(number, tokens=tokens).batch)
        return self._exact[key]

    def plain(self, name: str, number: int) -> float:
        """Plain PyTorch's relative error of the same sum in bf16."""
        if (name, number) not in self._plain:
            exact = self.exact(name, number)
            model: Any = MODELS[name]().to(torch.bfloat16)
            if self.sequence > 1:
                model.set_attn_implementation("eager")
            factors = exact.factors(CLIP)
            self._plain[name, number] = plain_error(model, Examples(number).batch, exact, factors=factors)
        return self._plain[name, number]

    def sum(
        self,
        title: str,
        name: str,
        precision: str,
        strategy: str,
        number: int,
        physical: int,
        ckpt: Any,
        num_workers: int = 0,
        tokens: int = TOKENS,
        tiles: int | None = None,
        by_length: bool = False,
    ) -> None:
        """One logical batch of all examples: the clipped sum that reached the optimiser, against the oracle.

        ``tiles``: tokens of one; with them comes all of ``dpft.long_context``. ``by_length``: sorted before the cut.
        """
        model, examples = MODELS[name](), Examples(number, tokens=tokens)
        model = model.to(torch.bfloat16) if precision == "bf16 weights" else model
        before = {n: p.detach().clone().float() for n, p in trainable(model).items()}
        if ckpt:
            model.gradient_checkpointing_enable(  # type: ignore[operator]  # every model here is Hugging Face's
                gradient_checkpointing_kwargs={"use_reentrant": ckpt == "reentrant"}
            )
        if tiles is not None:
            dpft.long_context(model, tile_mlp=tiles)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        made = self.private(
            model,
            optimizer,
            examples,
            precision,
            max_physical_batch_size=physical,
            strategy=strategy,
            num_workers=num_workers,
            lengths=examples.batch["attention_mask"].sum(1) if by_length else None,
        )
        counts, after = self.train(*made), full_parameters(made[0], made[1])
        release = {n: (before[n] - after[n]) / RATE * number for n in before}
        self.note(
            title,
            error=relative_error(release, self.exact(name, number, tokens).clipped_sum(CLIP)),
            limit=1e-5 if precision == "float32" else 2 * self.plain(name, number),
            physical=counts,
        )

    def steps(self, title: str, precision: str, strategy: str) -> None:
        """Five steps of Adam without noise, on batches that are the same on any number of ranks."""
        model = plain_llama()
        optimizer = torch.optim.Adam(model.parameters(), **ADAM)
        privacy = {
            "sampler": "fixed_size",
            "accountant": "rdp",
            "sample_rate": None,
            "expected_batch_size": STEPS["batch"],
            "num_steps": STEPS["steps"],
        }
        examples = Examples(STEPS["examples"])
        made = self.private(
            model, optimizer, examples, precision, strategy=strategy, privacy=privacy, test_seed=STEPS["seed"]
        )
        counts = self.train(*made)
        after = full_parameters(made[0], made[1])
        torch.save(after, self.output / f"{title}_{made[0].process_index}.pt")
        self.note(title, physical=counts)

    def noise(self, title: str, precision: str, **more: Any) -> None:
        """Logical batches without an example release noise alone: N(0, (sigma C / b)^2) in every element, once."""
        model, sigma, expected = plain_llama(), 3.0, 4
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        privacy = {
            "noise_multiplier": sigma,
            "sample_rate": 1e-9,
            "expected_batch_size": expected,
            "num_steps": 3,
            **more,
        }
        accelerator, prepared, stepped, loader = self.private(
            model, optimizer, Examples(6), precision, privacy=privacy, max_physical_batch_size=2
        )
        releases, rows = [], 0
        for batch in loader:
            rows += int(batch["example_weight"].sum())
            accelerator.backward(prepared(**batch).loss)
            stepped.step()
            stepped.zero_grad()
            after = full_parameters(accelerator, prepared)
            change = torch.cat([((before[n] - after[n]) / RATE).flatten().double() for n in before])
            releases.append(change)
            before = after
        loader.privacy.close()
        z = torch.stack(releases) * expected / (sigma * CLIP)
        torch.save(z, self.output / f"noise_{title.split(', ')[1]}_{accelerator.process_index}.pt")
        self.note(title, examples=rows, sizes=[p.numel() for p in before.values()])

    def note(self, title: str, **facts: Any) -> None:
        self.results[title] = facts

    def write(self, rank: int) -> None:
        (self.output / f"results_{rank}.json").write_text(json.dumps(self.results))


def full_parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters in float32, whole, under canonical names; on every rank."""
    bare = accelerator.unwrap_model(model)
    full: dict[str, Tensor] = {}
    for name, p in trainable(bare).items():
        given: Any = p
        if accelerator.state.deepspeed_plugin is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            full[name] = safe_get_full_fp32_param(given).detach().clone().view(getattr(p, "ds_shape", p.shape))
        elif hasattr(given, "full_tensor"):
            full[name] = given.full_tensor().detach().clone().float()
        else:
            full[name] = p.detach().clone().float()
    return full


def run_hybrid(bench: Bench) -> None:
    for strategy in ("one_pass", "two_pass"):
        bench.sum(f"sum, {strategy}", "llama", "float32", strategy, 9, 2, False)
    bench.sum("two ranks without an example", "tied", "float32", "one_pass", 2, 2, False)
    bench.noise("noise, float32", "float32")


def run_matrix(bench: Bench) -> None:
    for precision in ("float32", "bf16"):
        for ckpt in (False, "non-reentrant"):
            for strategy in ("one_pass", "two_pass"):
                title = f"sum, {precision}, {strategy}, checkpointing {ckpt}"
                bench.sum(title, "llama", precision, strategy, 5, 2, ckpt)
    for precision, strategy in (("float32", "one_pass"), ("float32", "two_pass"), ("bf16", "one_pass")):
        bench.steps(f"steps, {precision}, {strategy}", precision, strategy)
    for precision in ("float32", "bf16"):
        bench.noise(f"noise, {precision}", precision)
    check_together(bench)


def run_situations(bench: Bench) -> None:
    for strategy in ("one_pass", "two_pass"):
        for name in ("tied", "frozen embedding", "lora", "gpt2", "experts", "hybrid"):
            bench.sum(f"{name}, {strategy}", name, "float32", strategy, 5, 2, False)
        bench.sum(f"a rank without an example, {strategy}", "llama", "float32", strategy, 1, 2, False)
        bench.sum(f"five physical batches, {strategy}", "llama", "float32", strategy, 9, 1, False)
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":  # which refuses it
            bench.sum(f"in tiles, {strategy}", "tied", "float32", strategy, 5, 2, False, tiles=3)
    bench.sum("by a worker process, by length", "llama", "float32", "one_pass", 9, 2, False, 1, by_length=True)
    # Three examples on one rank and two on the other, each of them with collectives of its own.
    bench.sum("per_example", "llama", "float32", "per_example", 5, 4, False)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        bench.offload = True
        bench.sum("shards on the CPU", "tied", "float32", "one_pass", 5, 2, False)
        bench.sum("shards on the CPU, bf16", "llama", "bf16", "two_pass", 5, 2, "non-reentrant")
        bench.offload = False
    if not bench.deepspeed:  # which refuses it: see test_refusals.py
        bench.sum("reentrant checkpointing", "llama", "float32", "two_pass", 5, 2, "reentrant")
        for strategy in ("one_pass", "two_pass"):
            bench.sum(f"bf16 weights, {strategy}", "llama", "bf16 weights", strategy, 5, 2, False)


def run(output: Path, which: str) -> Bench:
    """``all``, ``matrix`` or ``hybrid``."""
    gc.freeze()  # what is imported stays: DeepSpeed collects garbage at every end of an engine
    bench = Bench(output, which == "hybrid")
    if which == "hybrid":
        run_hybrid(bench)
    else:
        run_matrix(bench)
        if which == "all":
            run_situations(bench)
    bench.write(dist.get_rank() if dist.is_initialized() else 0)
    return bench
