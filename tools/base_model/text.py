"""The public text that the recipes' base model is made of, and its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pydoc_data.topics import topics
from types import MappingProxyType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

REPEATS_DOCSTRINGS = frozenset({"debugger"})


SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
MASK = {"mask_token": "<mask>"}  # an encoder's, besides


def split_topics(held_out_share: float = 0.1) -> tuple[list[str], list[str]]:
    """Split the documentation topics into training and held-out texts.

    Args:
        held_out_share: share of the topics kept for the reported loss, drawn by a hash of the topic's name.

    Returns:
        Training texts and held-out texts, each in the order of the topics' names.
    """
    train: list[str] = []
    held_out: list[str] = []
    for name in sorted(topics):
        if name in REPEATS_DOCSTRINGS:
            continue
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        (held_out if fraction < held_out_share else train).append(topics[name].strip())
    return train, held_out


def train_tokenizer(
    texts: list[str], vocab_size: int, more: Mapping[str, str] = MappingProxyType({})
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which has a token for every byte and so no unknown text.

    Args:
        texts: public texts.
        vocab_size: number of tokens, the special ones included.
        more: special tokens besides :data:`SPECIAL`.

    Returns:
        A tokenizer that puts ``<bos>`` in front, as Llama's does; whoever needs ``<eos>`` appends it.
    """
    special = {**SPECIAL, **more}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, padding_side="right", **special)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Concatenate the texts to one stream of tokens; packing is harmless here because this text is public.

    Returns an int64 tensor [number of tokens].
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)
