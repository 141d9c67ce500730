"""What the memory profiler measures: a model, a batch, a way to train it; and the command line's words for them."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.benchmarks.cases import Shape, build_model, find_method, input_ids
from tools.trainers.implementations import (
    DPFastGradientClippingTrainer,
    DPFlashClippingTrainer,
    DPGhostClippingTrainer,
    DPSGDTrainer,
    StandardTrainer,
    Trainer,
)

STRATEGIES = ("auto", "one_pass", "two_pass", "per_example")
ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
LORA_TARGETS = "all-linear"
Made = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """One model, batch and machine.

    Attributes:
        vocab_size, hidden_dim, num_layers, num_heads: of a Llama, untied; not used where there is a ``model``.
        num_kv_heads, intermediate_dim: 0 takes ``num_heads`` and 11/4 of ``hidden_dim``.
        seq_len, batch_size: T and B; every row is full.
        num_iter, warmup_iter: steps that are measured, and steps before them.
        model: a folder, or a name on the hub.
        dtype: of the parameters.
        lora: rank; 0 trains everything.
        strategy, loss_chunk: of :func:`dpft.wrap`, for the experiments that leave them open.
        memory_limit: bytes that the process may allocate beyond its model; None: no limit.
        simulate: on tensors without data.
        engine, world_size: of what is simulated; ``docs/engines.md``.
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    seq_len: int
    batch_size: int = 1
    num_iter: int = 3
    warmup_iter: int = 2
    num_kv_heads: int = 0
    intermediate_dim: int = 0
    model: str | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    lora: int = 0
    device: str = "cpu"
    strategy: str = "auto"
    loss_chunk: int | str | None = "auto"
    optimizer: str = "adamw"
    seed: int = 0
    threads: int = 1
    memory_limit: int | None = None
    simulate: bool = False
    engine: str = "single"
    world_size: int = 1

    @property
    def shape(self) -> Shape:
        """The same for the benchmarks' model."""
        return Shape(
            width=self.hidden_dim,
            layers=self.num_layers,
            vocab=self.vocab_size,
            tokens=self.seq_len,
            rows=self.batch_size,
            dtype=self.dtype,
            checkpointing=self.gradient_checkpointing,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            intermediate=self.intermediate_dim,
        )

    def config(self) -> dict[str, Any]:
        """For the result."""
        return asdict(self)


SIZES = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "intermediate_dim")
# The seeds' shape on a GPU; on a CPU one that takes a second a step.
PRESETS: dict[str, dict[str, int]] = {
    "cuda": {"vocab_size": 32000, "hidden_dim": 2048, "num_layers": 20, "num_heads": 16, "seq_len": 16384},
    "cpu": {"vocab_size": 8000, "hidden_dim": 256, "num_layers": 4, "num_heads": 4, "seq_len": 1024},
}


@dataclass(frozen=True)
class Experiment:
    """A way to train.

    Attributes:
        trainer: makes it, ``(model, setup, made) -> Trainer``; ``made`` as a :class:`Trainer` calls it.
        words: what a reader is told.
        library: whose private step it is: ``"dpft"``, ``"opacus"``, or ``"plain"`` where there is none.
    """

    trainer: Callable[[Any, Setup, Made], Trainer]
    words: str
    library: str

    @property
    def reentrant(self) -> bool:
        """Whether gradient checkpointing has to be of the reentrant kind."""
        return self.library == "opacus"


def _plain(model: Any, setup: Setup, made: Made) -> Trainer:
    return StandardTrainer(model, rows=setup.batch_size, made=made)


def _ours(clipping: Any) -> Callable[[Any, Setup, Made], Trainer]:
    def make(model: Any, setup: Setup, made: Made) -> Trainer:
        options: dict[str, Any] = {"clipping": clipping, "loss_chunk": setup.loss_chunk, "made": made}
        if clipping == "flash":
            options["strategy"] = setup.strategy
        return DPFlashClippingTrainer(model, rows=setup.batch_size, **options)

    return make


def _opacus(kind: type[Trainer]) -> Callable[[Any, Setup, Made], Trainer]:
    return lambda model, setup, made: kind(model, rows=setup.batch_size, made=made)


EXPERIMENTS: dict[str, Experiment] = {
    "vanilla": Experiment(_plain, "plain training", "plain"),
    "ghost": Experiment(_ours("ghost"), "ghost clipping as published, by dpft: two passes, whole Grams", "dpft"),
    "flash_clip": Experiment(_ours("flash"), "dpft: norms without [T, T] matrices, head and loss in chunks", "dpft"),
    "fast": Experiment(_ours("fast"), "one layer's per-example gradients at a time, by dpft", "dpft"),
    "per_sample": Experiment(_ours("per_sample"), "all per-example gradients, by dpft", "dpft"),
    "opacus_ghost": Experiment(_opacus(DPGhostClippingTrainer), "Opacus' ghost clipping", "opacus"),
    "opacus_fast": Experiment(_opacus(DPFastGradientClippingTrainer), "Opacus' fast gradient clipping", "opacus"),
    "opacus_per_sample": Experiment(_opacus(DPSGDTrainer), "Opacus' per-example gradients", "opacus"),
}
DEFAULT_EXPERIMENTS = ("vanilla", "ghost", "flash_clip")


def make_model(setup: Setup, experiment: Experiment) -> Any:
    """The model in training mode, on the setup's device, or without data where it is simulated."""
    torch.manual_seed(setup.seed)
    device = "meta" if setup.simulate else setup.device
    if setup.model is None:
        model = build_model(setup.shape, device, find_method("opacus_ghost") if experiment.reentrant else None)
    else:
        model = _load(setup, device)
        if setup.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers renames it
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": experiment.reentrant}
                )
    if setup.lora:
        from peft import LoraConfig, get_peft_model

        if experiment.reentrant and setup.gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=setup.lora, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    return model.train()


def _load(setup: Setup, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, setup.dtype)
    if setup.simulate:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setup.model), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).to(device)
        for t in (*model.parameters(), *model.buffers()):
            if device == "cpu" and not t.untyped_storage().resizable():
                t.data = t.data.clone()  # a part of the file, mapped into memory, which no allocator has counted
    model.config.use_cache = False
    return model


def make_batch(setup: Setup, model: Any, tokens: int | None = None) -> Tensor:
    """``[B, T]`` int64."""
    if setup.simulate:
        return torch.empty((setup.batch_size, tokens or setup.seq_len), dtype=torch.int64, device="meta")
    if setup.model is None:
        return input_ids(setup.shape, setup.device, tokens)
    generator = torch.Generator().manual_seed(1)
    shape = (setup.batch_size, tokens or setup.seq_len)
    return torch.randint(0, model.get_input_embeddings().num_embeddings, shape, generator=generator).to(setup.device)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


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
    group.add_argument("--lora", type=_not_negative, default=0, metavar="RANK", help="train adapters on all linears")
    strategy = group.add_mutually_exclusive_group()
    strategy.add_argument("--strategy", choices=STRATEGIES, default="auto", help="of flash_clip")
    for name in STRATEGIES[1:3]:
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


def find_experiments(names: list[str], simulate: bool = False) -> list[str]:
    """The names, each once.

    Raises:
        ValueError: an unknown one, or one that cannot be simulated.
    """
    if simulate and "opacus_ghost" in names:
        raise ValueError("opacus_ghost reads token ids to take an embedding's norm; it cannot be simulated")
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment {name!r} is unknown; expected one of {', '.join(EXPERIMENTS)}")
    return list(dict.fromkeys(names))
