"""Time and FLOPs of one training step: plain, dpft's strategies, Opacus' ghost clipping, interleaved in one process.

    python tools/compare_steps.py --hidden 512 --layers 4 --seq-len 2048 --batch-size 1 --rounds 5

Prints ratios to the plain step of the same round, with their spread, and one line of JSON with the conditions. A
method whose clipped sum is not that of the others (relative error above 1e-4) gets no time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import dpft

Step = Callable[[], list[Tensor]]


def build(args: argparse.Namespace) -> Any:
    """A Llama of the asked size, from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.seq_len,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Backward, and the gradients taken out of the model."""
    loss.backward()
    found = []
    for p in model.parameters():
        assert p.grad is not None
        found.append(p.grad)
        p.grad = None
    return found


def dpft_step(model: Any, ids: Tensor, **options: Any) -> Step:
    """A step of ours; without options, of plain training."""
    if options:
        dpft.wrap(model, max_grad_norm=1.0, **options)
    return lambda: gradients(model, model(input_ids=ids, labels=ids).loss)


def opacus_step(model: Any, ids: Tensor) -> Step:
    """A step of Opacus' ghost clipping on the same per-example loss."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def step() -> list[Tensor]:
        logits = module(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="none"
        )
        losses = losses.view(len(ids), -1).mean(1)
        losses.mean().backward(retain_graph=True)
        factors = module.get_clipping_coef()
        for p in module.parameters():
            p.grad = None
        module.disable_hooks()
        found = gradients(module, (losses * factors.to(losses)).sum())
        module.enable_hooks()
        for p in module.parameters():
            for kept in ("_norm_sample", "norm_sample"):
                if hasattr(p, kept):
                    setattr(p, kept, None)
        return found

    return step


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative error of the whole gradient."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((error / sum(float(b.double().square().sum()) for b in expected)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("layers", 4), ("vocab", 4000), ("seq-len", 2048), ("batch-size", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--no-opacus", action="store_true")
    args = parser.parse_args()
    ids = torch.randint(0, args.vocab, (args.batch_size, args.seq_len), generator=torch.Generator().manual_seed(1))
    base = build(args)
    steps: dict[str, Step] = {"plain": dpft_step(copy.deepcopy(base), ids)}
    steps["one-pass"] = dpft_step(copy.deepcopy(base), ids, strategy="one_pass")
    steps["two-pass"] = dpft_step(copy.deepcopy(base), ids, strategy="two_pass")
    # Opacus refuses non-reentrant checkpointing.
    if not args.no_opacus and not args.gradient_checkpointing:
        steps["opacus ghost"] = opacus_step(copy.deepcopy(base), ids)
    reference = dpft_step(copy.deepcopy(base), ids, strategy="per_example")()
    flops: dict[str, int] = {}
    for name in list(steps):
        with FlopCounterMode(display=False) as counter:
            found = steps[name]()
        flops[name] = counter.get_total_flops()
        error = 0.0 if name == "plain" else relative_error(found, reference)
        print(f"{name:13} relative error of the clipped sum {error:.1e}", flush=True)
        if error > 1e-4:
            print(f"{name:13} is wrong: no time is reported")
            del steps[name]
        elif name != "plain":  # the isolation check of the first steps is not what a long run consists of
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, times in seconds.items():
        ratios = [t / plain for t, plain in zip(times, seconds["plain"], strict=True)]
        row = {
            "flops_ratio": flops[name] / flops["plain"],
            "time_ratio_median": statistics.median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
            "seconds_median": statistics.median(times),
        }
        results[name] = {key: round(value, 4) for key, value in row.items()}
        print(
            f"{name:13} FLOPs {row['flops_ratio']:.3f} x   time {row['time_ratio_median']:.2f} x "
            f"({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})   {row['seconds_median']:.2f} s"
        )
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "opacus")}
    conditions = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    print(json.dumps({"arguments": vars(args), "results": results, "versions": versions, "conditions": conditions}))


if __name__ == "__main__":
    main()
