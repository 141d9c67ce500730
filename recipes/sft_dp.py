"""Fine-tune a chat model on conversations under differential privacy.

    accelerate launch recipes/sft_dp.py
    accelerate launch recipes/sft_dp.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset chats.jsonl --seq-len 1024 --bf16

A conversation is one example and the unit that is protected; the loss is on the assistant's tokens. Without
arguments: the small Llama kept beside this file, questions about Python's standard library answered by its docstrings,
epsilon 8, a few minutes on two cores, no network. Formats and templates: docs/sft.md.
"""

from typing import Any

from finetune.run import main as run  # first of all: what it imports sets what torch reads when it is imported

# isort: split
from accelerate import Accelerator
from finetune.chats import CHATS, ChatOptions, chat_materials, sample_reply
from finetune.materials import Materials
from finetune.recipe import Recipe


class SFT(Recipe):
    """Supervised fine-tuning on conversations."""

    name = "sft_dp"
    options = ChatOptions
    loss_unit = "nats a token of the assistant"
    unit = "conversation"
    demonstration = CHATS

    def materials(self, options: Any, accelerator: Accelerator) -> Materials:
        """Conversations, with labels on the tokens that are trained."""
        return chat_materials(options, accelerator)

    def sample(self, model: Any, materials: Materials, options: Any, accelerator: Accelerator) -> str:
        """What the model answers to ``--prompt``."""
        return sample_reply(model, materials, options, accelerator)


def main(argv: list[str] | None = None) -> int:
    """Read the options and run."""
    return run(SFT(), __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
