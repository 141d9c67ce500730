"""The longest private texts that fit, planned: by model, training and number of cards. Anywhere, without weights.

    python tools/plan_long_context.py --json docs/benchmarks/long_context_planned.json
    python tools/plan_long_context.py --models llama-3.2-1b --trainings full --cards 1

Each row is :func:`dpft.longest` of a model of bf16 parameters on meta, B = 1, AdamW, on cards of 80 GB (80e9 bytes):
one with sums and optimiser in 128 GiB of host memory, or eight under ZeRO-2, whose whole parameters allow tiles, with
sequence parallelism over all of them and 1 TiB. Rows with `tokens` are the plan of that length. Everything here is
predicted; nothing has run on a GPU. A row is written when it is known, and those in the file already are kept.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

import torch
import transformers as hf
from torch import nn

import dpft
from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json

GIB = 2**30
# As their configurations on the hub say.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "kind": "Llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "kind": "Llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen3-4b": {
        "kind": "Qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
TRAININGS = ("lora", "full")
LORA = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
CARDS: dict[int, dict[str, Any]] = {
    1: {"host_memory": 128 * GIB, "sums_device": "cpu"},
    8: {"host_memory": 1024 * GIB, "engine": "zero2", "world_size": 8, "sequence_parallel": 8},
}
# What was to be planned: model, training, cards, tokens.
ASKED = (
    ("llama-3.1-8b", "lora", 1, 262_144),
    ("llama-3.2-1b", "full", 1, 262_144),
    ("llama-3.1-8b", "full", 8, 2_097_152),
    ("llama-3.1-8b", "lora", 8, 2_097_152),
)


def build(name: str, training: str) -> nn.Module:
    """A model without values."""
    sizes = dict(MODELS[name])
    kind = sizes.pop("kind")
    config = getattr(hf, f"{kind}Config")(max_position_embeddings=131072, use_cache=False, **sizes)
    with torch.device("meta"):
        model: nn.Module = getattr(hf, f"{kind}ForCausalLM")(config)
        if training == "lora":
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    return model


def row_of(plan: dpft.Plan) -> dict[str, Any]:
    """The figures of a plan."""
    chosen, long = plan.predictions[plan.choice], plan.long
    assert long is not None
    return {
        "strategy": plan.choice,
        "fits": plan.fits,
        "device_bytes": chosen.total_bytes,
        "device": long.device,
        "peak_in": long.at_peak,
        "host_bytes": long.host_total,
        "host_of_a_rank": long.host,
        "seconds": chosen.seconds,
        "time_of_plain": chosen.time_ratio,
        "peak_of_plain": chosen.memory_ratio,
        "waits_for_offload": long.transfer is not None and long.transfer.binds,
    }


def plan_row(name: str, training: str, cards: int, tokens: int | None) -> dict[str, Any]:
    """One row: of ``tokens``, or of the most that fit."""
    model = build(name, training)
    options: dict[str, Any] = {"dtype": "bf16", "optimizer": "adamw", "long_context": True, "hardware": "h100"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beyond the positions of the configuration, which is meant
        if tokens is not None:
            return {"tokens": tokens, **row_of(dpft.plan(model, 1, tokens, **options, **CARDS[cards]))}
        found = dpft.longest(model, **options, **CARDS[cards])
    return {"longest": found.seq_len, "more": found.binds, **row_of(found.plan)}


def main(description: str | None, arguments: list[str] | None = None) -> None:
    """Read the command line and plan every row."""
    parser = Parser("plan_long_context", description)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--cards", nargs="+", type=int, choices=tuple(CARDS), default=list(CARDS))
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    wanted: list[tuple[str, str, int, int | None]] = [
        *(row for row in ASKED if row[0] in args.models and row[1] in args.trainings and row[2] in args.cards),
        *((m, t, c, None) for m in args.models for t in args.trainings for c in args.cards),
    ]
    rows: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    there = {(row["model"], row["training"], row["cards"], row.get("tokens")) for row in rows}
    for name, training, cards, tokens in wanted:
        if (name, training, cards, tokens) in there:
            continue
        say(f"{name} {training}, {cards} cards, {'longest' if tokens is None else tokens}")
        rows.append({"model": name, "training": training, "cards": cards, **plan_row(name, training, cards, tokens)})
        if args.json:
            write_json(args.json, {"memory": 80 * 10**9, "conditions": conditions(1), "rows": rows})
    print(f"{'model':14}{'training':10}cards     tokens  fits  device GiB  host GiB  hours  peak in")
    for row in rows:
        tokens, mark = (row["tokens"], " ") if "tokens" in row else (row["longest"], "*")
        figures = f"{row['device_bytes'] / GIB:10.2f}  {row['host_bytes'] / GIB:8.2f}  {row['seconds'] / 3600:5.2f}"
        fits = "yes" if row["fits"] else "no"
        what = f"{row['model']:14}{row['training']:10}{row['cards']:5}{tokens:11,}{mark}"
        print(f"{what} {fits:4} {figures}  {row['peak_in']}")
    print("* the most that fit")


if __name__ == "__main__":
    main(__doc__)
