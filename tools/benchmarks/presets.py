"""What benchmark_steps.py runs: shapes and methods, by name."""

from __future__ import annotations

from dataclasses import dataclass

from tools.benchmarks.cases import STRATEGIES, Shape

OPACUS = ("opacus_hooks", "opacus_ghost", "opacus_fast")
EVERYTHING = ("plain", *STRATEGIES, *OPACUS, "fastdp")
OURS = ("plain", *STRATEGIES)


@dataclass(frozen=True)
class Run:
    """One shape.

    Attributes:
        methods: names in benchmarks.cases.METHODS; ``plain`` is what the others are compared with.
        rounds: how often each is timed; 0 for memory and FLOPs alone.
        alone: one process after the other, not all at once and in turns: where only one fits on the device.
        first: whether the first steps of a private model, which have isolation checks, are timed as well.
    """

    shape: Shape
    methods: tuple[str, ...]
    rounds: int = 3
    alone: bool = False
    first: bool = False


@dataclass(frozen=True)
class Longest:
    """A search for the longest context that fits.

    Attributes:
        start, step: tokens; doubled from ``start`` until it fails, then bisected to multiples of ``step``.
        most: tokens; not looked beyond. The model of ``shape`` is made for that many.

    Raises:
        ValueError: ``start`` or ``most`` is no multiple of ``step``.
    """

    shape: Shape
    methods: tuple[str, ...]
    start: int
    step: int
    most: int

    def __post_init__(self) -> None:
        if min(self.step, self.start) < 1 or self.start % self.step or self.most % self.step or self.start > self.most:
            raise ValueError(
                f"a search from {self.start} to {self.most} tokens in steps of {self.step}; expected both ends to be "
                "multiples of the step, the first not above the second"
            )


@dataclass(frozen=True)
class Preset:
    """What is run, in this order, and the seconds after which nothing more is started."""

    device: str
    parts: tuple[Run | Longest, ...]
    seconds: float

    @property
    def runs(self) -> list[Run]:
        """Without the searches."""
        return [part for part in self.parts if isinstance(part, Run)]


# In the order of what matters: on a slower machine the end is skipped.
def _short(tokens: int, rows: int, lora: int = 0) -> Shape:
    return Shape(tokens=tokens, rows=rows, vocab=8000, lora=lora)


_ENCODER = Shape("bert", 384, 6, 30_522, tokens=64, rows=32)
_SHORT = (
    Run(_short(128, 16), ("plain", "one_pass", *OPACUS), rounds=7, first=True),
    Run(_ENCODER, ("plain", "one_pass", "opacus_ghost"), rounds=7, first=True),
    Run(_short(64, 32), ("plain", "one_pass", "opacus_ghost"), rounds=7),
    Run(_short(64, 16, lora=8), ("plain", "one_pass"), rounds=9, first=True),
    Run(_short(128, 16, lora=8), ("plain", "one_pass"), rounds=7),
    Run(_short(512, 8), ("plain", "one_pass", "opacus_ghost"), rounds=3),
    Run(_short(512, 8, lora=8), ("plain", "one_pass"), rounds=3),
)
_CPU = Preset(
    "cpu",
    (
        Run(Shape(tokens=2048), EVERYTHING, rounds=3),
        *_SHORT,
        Run(Shape(tokens=2048, rows=4), ("plain", "one_pass", "opacus_ghost"), rounds=2),
        Run(Shape(tokens=4096, vocab=32_000, checkpointing=True), OURS, rounds=0),
        Run(Shape(tokens=512), EVERYTHING, rounds=3),
        Run(Shape(tokens=1024), EVERYTHING, rounds=2),
        Run(Shape("gpt2", tokens=1024), EVERYTHING, rounds=2),
        Run(Shape(tokens=1024, checkpointing=True), EVERYTHING, rounds=2),
        Run(Shape("gpt2", tokens=512, checkpointing=True), EVERYTHING, rounds=2),
        Run(Shape(tokens=512, rows=4), EVERYTHING, rounds=2),
    ),
    seconds=1500,
)


def _large(tokens: int, checkpointing: bool) -> Shape:
    return Shape("llama", 2048, 20, 32_000, tokens, dtype="bfloat16", checkpointing=checkpointing)


# Llama-3.2-1B as its model card and configuration have it.
_ONE_B = Shape(
    architecture="llama",
    width=2048,
    layers=16,
    vocab=128_256,
    tokens=131_072,
    dtype="bfloat16",
    checkpointing=True,
    update=True,
    heads=32,
    kv_heads=8,
    intermediate=8192,
    tied=True,
)
_GPU = Preset(
    "cuda",
    (
        Run(_large(16_384, False), ("plain", "one_pass", "two_pass", "two_pass_triton", "opacus_ghost"), rounds=5),
        Run(_ONE_B, ("one_pass", "plain"), rounds=1, alone=True),
        Run(_large(65_536, True), ("plain", "one_pass"), rounds=2),
        Run(_large(4096, False), (*EVERYTHING, "one_pass_triton"), rounds=3),
        Longest(_large(262_144, True), ("plain", "one_pass"), start=131_072, step=65_536, most=262_144),
        Run(_large(16_384, True), OURS, rounds=2),
        Run(_large(32_768, True), ("plain", "one_pass"), rounds=2),
        Run(_large(8192, False), EVERYTHING, rounds=2),
    ),
    seconds=400,
)
_SMOKE = Preset(
    "cpu",
    (
        Run(Shape("llama", 64, 2, 500, 64, 2), ("plain", "one_pass", "two_pass", "opacus_ghost"), rounds=2),
        Run(Shape("gpt2", 64, 2, 500, 64, 2, checkpointing=True), ("plain", "per_example", "opacus_hooks"), rounds=1),
    ),
    seconds=60,
)
PRESETS = {"cpu": _CPU, "short": Preset("cpu", _SHORT, seconds=900), "gpu": _GPU, "smoke": _SMOKE}
