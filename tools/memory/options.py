"""The command line of tools/profile_memory.py: its commands, and the options that describe a :class:`Setup`."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

import torch

from tools.benchmarks.cases import STRATEGIES
from tools.common.command_line import Parser
from tools.common.json_files import json_path
from tools.memory.setup import DEFAULT_EXPERIMENTS, EXPERIMENTS, Setup

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
RESULTS = Path("memory_profiling_results")
SIZES = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "intermediate_dim")
# The seeds' shape on a GPU; on a CPU one that takes a second a step.
PRESETS: dict[str, dict[str, int]] = {
    "cuda": {"vocab_size": 32000, "hidden_dim": 2048, "num_layers": 20, "num_heads": 16, "seq_len": 16384},
    "cpu": {"vocab_size": 8000, "hidden_dim": 256, "num_layers": 4, "num_heads": 4, "seq_len": 1024},
}


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, :data:`sys.argv` where no ``arguments`` are given; what is wrong with it exits with status 2.

    Args:
        description: what ``--help`` says of the program.
    """
    parser = Parser("profile_memory", description)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = "; ".join(f"{name}: {experiment.words}" for name, experiment in EXPERIMENTS.items())

    run = commands.add_parser("run", help="several experiments, with pictures and a report")
    run.add_argument(
        "--experiments", nargs="+", default=list(DEFAULT_EXPERIMENTS), metavar="NAME", help=f"of {listed}"
    )
    run.add_argument("--output-dir", type=Path, default=RESULTS, help="run_TIME is made in it")
    single = commands.add_parser("single", help="one experiment, to one file")
    single.add_argument("--experiment", required=True, metavar="NAME", help=f"of {listed}")
    single.add_argument("--output", type=json_path, required=True, help="a file that ends in .json")
    for command in (run, single):
        command.add_argument("--repetitions", type=positive, default=1, help="each with the next seed")
        command.add_argument("--json", action="store_true", help="the results to standard output, as JSON")
        add_setup(command)

    plot = commands.add_parser("plot", help="pictures and report of stored results")
    plot.add_argument("--input-dir", type=Path, required=True)
    plot.add_argument("--output-dir", type=Path, required=True)

    words = "fail where B takes more memory than A: at its peak, or of any component, even if the peak falls"
    against = commands.add_parser("compare", help=words, description=words)
    against.add_argument("before", type=Path, metavar="A", help="a result, or the folder of a run")
    against.add_argument("after", type=Path, metavar="B")
    above = "that B may be above A; default 5"
    against.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help=above)
    least = "a smaller difference is none; default 1"
    against.add_argument("--least-mb", type=float, default=1.0, metavar="MIB", help=least)
    against.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return DTYPES[text]


def _chunk(text: str) -> int | str | None:
    return {"auto": "auto", "none": None}[text] if text in ("auto", "none") else positive(text)


def add_setup(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`Setup`."""
    group = parser.add_argument_group("what is measured")
    for name in SIZES[:4]:
        preset = ", ".join(f"{PRESETS[kind][name]} on a {word}" for kind, word in (("cuda", "GPU"), ("cpu", "CPU")))
        group.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"default {preset}")
    group.add_argument("--num-kv-heads", type=positive, help="default: num-heads")
    group.add_argument("--intermediate-dim", type=positive, help="default: 11/4 of hidden-dim")
    group.add_argument("--model", help="a folder, or a name on the hub, in the place of a Llama of these sizes")
    group.add_argument("--seq-len", type=positive, help="T; default 16384 on a GPU, 1024 on a CPU")
    group.add_argument("--batch-size", type=positive, default=1, help="B")
    steps = "default 3; simulated 1, since all are alike"
    group.add_argument("--num-iter", type=positive, help=f"steps that are measured; {steps}")
    group.add_argument("--warmup-iter", type=positive, help="steps before them; default 2, simulated 1")
    group.add_argument("--dtype", type=_dtype, default="float32", help="of the parameters: float32 or bfloat16")
    group.add_argument("--gradient-checkpointing", action="store_true")
    tiles = "with dpft.long_context, plain training too: tiles, and checkpoints' inputs in host memory"
    group.add_argument("--long-context", action="store_true", help=tiles)
    group.add_argument("--lora", type=_not_negative, default=0, metavar="RANK", help="train adapters on all linears")
    strategy = group.add_mutually_exclusive_group()
    strategy.add_argument("--strategy", choices=("auto", *STRATEGIES), default="auto", help="of flash_clip")
    for name in STRATEGIES[:2]:
        option = f"--{name.replace('_', '-')}"
        strategy.add_argument(option, dest="strategy", action="store_const", const=name, help=f"--strategy {name}")
    chunk = "tokens of logits at a time: auto, none, a number"
    group.add_argument("--loss-chunk", type=_chunk, default="auto", help=chunk)
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    group.add_argument("--seed", type=_not_negative, default=0)
    group.add_argument("--memory-limit", type=float, metavar="GIB", help="for a process, beyond its model")
    group.add_argument("--simulate", action="store_true", help="on tensors without data: any size, no times")
    group.add_argument("--engine", choices=ENGINES, default="single", help="of what is simulated")
    group.add_argument("--world-size", type=positive, default=1, help="ranks of the engine")


def setup_of(args: argparse.Namespace) -> Setup:
    """What the options say.

    Raises:
        ValueError: options that contradict each other, or what this machine does not have; one line.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available() and not args.simulate:
        raise ValueError("--device cuda was asked for and torch finds no GPU; --device cpu, or --simulate")
    if args.model is not None:
        given = [f"--{name.replace('_', '-')}" for name in SIZES if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--model brings its own sizes; got {given[0]} too. Leave one of them out")
        if args.model.startswith((".", "/", "~")) and not (Path(args.model).expanduser() / "config.json").is_file():
            raise ValueError(f"--model {args.model} is no folder with a config.json")
    if not args.simulate and (args.engine != "single" or args.world_size != 1):
        raise ValueError("--engine and --world-size are of --simulate; tools/measure_engines.py measures real ones")
    if args.engine == "single" and args.world_size != 1:
        raise ValueError(f"--world-size {args.world_size} and --engine single is one process; name the engine")
    if args.engine != "single" and args.world_size == 1:
        raise ValueError(f"--engine {args.engine} needs --world-size of at least 2")
    if args.long_context and args.engine in ("fsdp2", "zero3"):
        raise ValueError(f"--engine {args.engine} shards parameters, where --long-context has no tiles; use zero2")
    if args.memory_limit is not None and args.simulate:
        raise ValueError("--memory-limit is of real runs; a simulated one takes no memory")
    if args.memory_limit is not None and not 0 < args.memory_limit < 2**30:
        raise ValueError(f"--memory-limit is {args.memory_limit}; expected GiB above 0, and fewer than 2**30")
    if args.seed + args.repetitions > 2**63:
        raise ValueError(f"--seed is {args.seed}; expected a number below 2**63")
    sizes = {name: getattr(args, name) for name in (*SIZES, "seq_len") if getattr(args, name) is not None}
    chosen = {**PRESETS[device], **sizes}
    if chosen["hidden_dim"] % chosen["num_heads"] or chosen["hidden_dim"] // chosen["num_heads"] % 2:
        raise ValueError(
            f"--hidden-dim {chosen['hidden_dim']} is not an even multiple of --num-heads {chosen['num_heads']}"
        )
    heads, kv_heads = chosen["num_heads"], chosen.get("num_kv_heads", chosen["num_heads"])
    if heads % kv_heads:
        raise ValueError(f"--num-heads {heads} is no multiple of --num-kv-heads {kv_heads}")
    names = {f.name for f in fields(Setup)} - {*PRESETS[device], *SIZES, "device", "memory_limit", "optimizer"}
    others = {name: getattr(args, name) for name in names}
    for name, count in (("num_iter", 3), ("warmup_iter", 2)):
        others[name] = others[name] or (1 if args.simulate else count)
    if args.model is not None and args.model.startswith("~"):
        others["model"] = str(Path(args.model).expanduser())
    limit = int(args.memory_limit * 2**30) if args.memory_limit else None
    return Setup(**chosen, **others, device=device, memory_limit=limit)


def check_model(setup: Setup) -> None:
    """Find out before anything is measured that there is no such model.

    Raises:
        OSError: there is none, or the hub cannot be reached.
        ValueError: its table of positions is shorter than T, which a simulation would not notice.
    """
    if setup.model is None:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setup.model)
    rows = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    if rows is not None and not rotary and setup.seq_len > rows:
        raise ValueError(
            f"--seq-len is {setup.seq_len}, and --model {setup.model} has learned {rows} positions; expected at most "
            f"--seq-len {rows}"
        )


def find_experiments(names: list[str], simulate: bool = False, long_context: bool = False) -> list[str]:
    """The names, each once.

    Raises:
        ValueError: an unknown one, or one that cannot be simulated or has no long context.
    """
    if simulate and "opacus_ghost" in names:
        raise ValueError("opacus_ghost reads token ids to take an embedding's norm; it cannot be simulated")
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment {name!r} is unknown; expected one of {', '.join(EXPERIMENTS)}")
        if long_context and EXPERIMENTS[name].reentrant:
            raise ValueError(
                f"{name} needs reentrant checkpoints, which --long-context has not; leave one of them out"
            )
    return list(dict.fromkeys(names))
