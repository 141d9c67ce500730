"""The stages, in the order of what they are worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: on the command line, and of its file.
        seconds: that it may take at most.
        what: in a few words.
        run: ``module:function`` in this package, called with a :class:`tools.gpu_stages.context.Context`.
    """

    name: str
    seconds: float
    what: str
    run: str


STAGES = (
    Stage("machine", 10, "card, driver, versions, missing packages", "machine:run"),
    Stage(
        "kernels", 60, "kernels by method and dtype, and a step of each strategy, against float64", "correctness:run"
    ),
    Stage("long", 90, "2048 x 20, T = 16,384, bf16: plain, one-pass, two-pass, Opacus", "steps:long"),
    Stage("short", 60, "the same model, 16 x 128, 64 x 256, 4 x 2048, full and LoRA: plain, one-pass", "steps:short"),
    Stage("profile", 30, "what kernels, launches and gaps a one-pass step adds to a plain one", "profiles:run"),
    Stage("llama_1b", 60, "Llama-3.2-1B's shape, T = 131,072, checkpointed, one step with AdamW", "steps:llama_1b"),
    Stage("long_context", 60, "the same at T = 262,144, dpft.long_context: one-pass, plain", "steps:long_context"),
    Stage("longer", 40, "T = 32,768 and 65,536, checkpointed: plain, one-pass", "steps:longer"),
    Stage("norms", 45, "norms of single layers, torch against Triton, and what impl='auto' should take", "norms:run"),
    Stage("memory", 50, "profile_memory.py run", "commands:memory"),
    Stage("recipe", 30, "a few steps of the recipe in bf16, from the options to the model card", "commands:recipe"),
)
NAMES = tuple(stage.name for stage in STAGES)


def find_stage(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)
