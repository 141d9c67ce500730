"""Attention of documents, windows and padded rows, against transformers' own with masks; and no mask ``[T, T]``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpft
from dpft.long_context import attention
from dpft.long_context.attention import Spans
from dpft.long_context.install import install
from tests import oracle, zoo
from tests.long_context.setups import long, tokens, without_checkpoints

T = 70
BLOCKS = 8, 16  # queries of a block: windows and texts of these tests have several


def mistral(window: int) -> Any:
    def build(implementation: str) -> nn.Module:
        config = hf.MistralConfig(
            **zoo._sizes(sliding_window=window, num_key_value_heads=2, max_position_embeddings=T)
        )
        return zoo.from_config(hf.MistralForCausalLM, config, implementation)

    return zoo.seeded(build)


def gemma3(implementation: str) -> nn.Module:
    kinds = {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = zoo._sizes(num_key_value_heads=2, head_dim=8, max_position_embeddings=T, **kinds)
    return zoo.from_config(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**sizes), implementation)


MODELS = {
    "grouped": zoo.seeded(lambda a: zoo.llama(a, num_key_value_heads=2, max_position_embeddings=T)),
    "window 5": mistral(5),
    "window 30": mistral(30),
    "window longer than a document": mistral(45),
    "windows and full": zoo.seeded(gemma3),
}
IDS = tokens(2, T)
PACKED = torch.stack(
    [torch.cat([torch.arange(n) for n in (30, 1, 39)]), torch.cat([torch.arange(n) for n in (50, 20)])]
)
RIGHT = (torch.arange(T) < torch.tensor([[T], [41]])).long()
BATCHES: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "full mask": {"attention_mask": torch.ones_like(IDS)},
    "padded": {"attention_mask": RIGHT},
    "packed": {"position_ids": PACKED},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCKS", BLOCKS)


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, without checkpoints: softmax in float64 is only known to the forward."""
    labels = IDS.masked_fill(batch.get("attention_mask", torch.ones_like(IDS)) == 0, -100)
    with oracle.Float64():
        logits = without_checkpoints(model.double())(input_ids=IDS, use_cache=False, **batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), oracle.grads_of(model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "packed" or name == "windows and full" else pytest.mark.slow)
        for name in MODELS
        for kind in BATCHES
    ],
)
def test_it_is_transformers_own(name: str, kind: str) -> None:
    for implementation in ("sdpa", "eager") if kind == "packed" else ("sdpa",):
        expected = run(MODELS[name](implementation), BATCHES[kind])
        model = install(MODELS[name](implementation), None, None)
        assert model.config._attn_implementation == attention.NAME
        found = run(model, BATCHES[kind])
        torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0.0)
        assert oracle.relative_error(found[1], expected[1]) < 1e-12


class Largest(TorchDispatchMode):
    """The largest number of elements behind the batch in a tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() >= 2 and t.shape[-1] == t.shape[-2] == T:
                self.masks += 1
        return out


@pytest.mark.parametrize("kind", BATCHES)
def test_there_is_no_square_of_the_length(kind: str) -> None:
    build = MODELS["windows and full"]
    with Largest() as plain:
        build("sdpa")(input_ids=IDS, use_cache=False, **BATCHES[kind])
    assert plain.masks, "the counter sees transformers' masks"
    model = long(build("sdpa"), 16)
    with Largest() as counted:
        model(input_ids=IDS, **BATCHES[kind]).logits.sum().backward()
    assert not counted.masks


def test_padding_on_the_left_is_refused() -> None:
    model = long(zoo.LLAMA.build())
    with pytest.raises(ValueError, match="padding_side = 'right'"):
        model(**zoo.token_batch(padding="left"))
    model(**zoo.token_batch(padding="right"))


def test_another_mask_is_refused() -> None:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k % 2 == 0) | (q - k <= 1))

    with pytest.raises(ValueError, match=r"\[T, T\]"):
        attention.mask_of(1, T, T, mask_function=seen)


def test_chunks_are_documents() -> None:
    """Llama 4's attention in chunks needs no code of its own."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q // 32 == k // 32) & (b >= 0)

    assert attention.mask_of(2, T, T, mask_function=seen, local_size=32) == Spans(True, None, [[32, 32, 6]] * 2)


def test_which_attention_is_replaced() -> None:
    model = zoo.from_config(hf.Gemma2ForCausalLM, hf.Gemma2Config(**zoo._sizes(head_dim=8)), "eager")
    with pytest.raises(ValueError, match="its scores are capped"):
        dpft.long_context(model)
    assert not any("_dpft" in name for module in model.modules() for name in module.__dict__), "half installed"
    assert model.config._attn_implementation == "eager"
    for implementation in ("flash_attention_2", "flex_attention"):
        model = zoo.LLAMA.build()
        model.config._attn_implementation_internal = implementation
        dpft.long_context(model)
        assert model.config._attn_implementation == implementation


def test_generation_has_its_own_masks() -> None:
    ids = tokens(1, 6)
    made = [
        model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for model in (zoo.LLAMA.build(), long(zoo.LLAMA.build()))
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_padded_encoders(strategy: str) -> None:
    """Their queries see all real keys, before and behind; keys are cut, and no mask is made."""
    batch = zoo.BERT.batch(examples=3, tokens=20)
    batch["attention_mask"][1, :3] = 0  # on the left, which an encoder allows
    plain = zoo.BERT.build().double()
    expected = zoo.BERT.losses(plain, batch)
    model = long(zoo.BERT.build()).double()
    found = zoo.BERT.losses(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    dpft.wrap(model, strategy=strategy, isolation="off")
    dpft.clipped_loss(model, zoo.BERT.losses(model, batch)).backward()
    exact = oracle.oracle(zoo.BERT.build(), batch, zoo.BERT.losses)
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0.0)
