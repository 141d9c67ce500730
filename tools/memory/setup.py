"""What is measured: a model and a batch (:class:`Setup`), and a way to train it (:class:`Experiment`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
        long_context: whether ``dpft.long_context`` is on, in plain training too.
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
    long_context: bool = False

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
