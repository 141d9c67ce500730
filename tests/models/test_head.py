"""The head and loss in chunks: the oracle's numbers whatever the chunk, and logits that are there when asked for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

import dpft
from dpft.kernels.head import HeadProducts, chunked_head_loss
from dpft.models.head import LazyLogits
from tests import oracle, zoo
from tests.clipping.against_oracle import (
    STRATEGIES,
    case_of,
    check,
    check_grads,
    check_stats,
    make_case,
    set_checkpointing,
)
from tests.memory_meter import MemoryMeter

# From 32 tokens on (in float32) the zoo's heads keep [V, D] per example, below that [T, V].
SHORT, LONG = 9, 40


def frozen_head(attention: str) -> nn.Module:
    model = zoo.llama(attention)
    model.lm_head.weight.requires_grad_(False)
    return model


def biased_head(attention: str, train_weight: bool = True) -> nn.Module:
    model = zoo.llama(attention)
    head = nn.Linear(zoo.WIDTH, zoo.VOCAB)
    head.weight.requires_grad_(train_weight)
    model.lm_head = head
    return model


def capped(attention: str) -> nn.Module:
    """Gemma 2 squeezes its logits before the loss: what the chunks would have computed is not its loss."""
    config = hf.Gemma2Config(
        **{**zoo._sizes(), "head_dim": 8, "pad_token_id": 0}, final_logit_softcapping=2.0, attn_logit_softcapping=20.0
    )
    return zoo.from_config(hf.Gemma2ForCausalLM, config, "eager")


FROZEN_HEAD = zoo.Entry("frozen-head", zoo.seeded(frozen_head), zoo.token_batch)
BIASED = zoo.Entry("biased-head", zoo.seeded(biased_head), zoo.token_batch)
BIAS_ONLY = zoo.Entry("bias-only", zoo.seeded(lambda a: biased_head(a, False)), zoo.token_batch)
CAPPED = zoo.Entry("capped", zoo.seeded(capped), zoo.token_batch)
HEADS = (zoo.LLAMA, zoo.LLAMA_TIED, zoo.GPT2, zoo.OPT, zoo.GEMMA, zoo.LORA, FROZEN_HEAD, BIASED, BIAS_ONLY, CAPPED)


def is_lazy(logits: Any) -> bool:
    return type(logits) is LazyLogits


@pytest.mark.parametrize(("tokens", "chunk"), [(SHORT, 7), (LONG, 7), (LONG, "auto")])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", HEADS, ids=str)
def test_any_chunk_is_exact(entry: zoo.Entry, strategy: str, tokens: int, chunk: Any) -> None:
    check(case_of(entry, tokens=tokens), strategy=strategy, loss_chunk=chunk)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.LLAMA], ids=str)
def test_one_example(entry: zoo.Entry, strategy: str) -> None:
    check(case_of(entry, tokens=LONG, examples=1), "non-reentrant", strategy=strategy, loss_chunk=16)


@pytest.mark.parametrize("tokens", [SHORT, 64])  # a bf16 head keeps [V, D] from 64 tokens on
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2], ids=str)
def test_bf16(entry: zoo.Entry, strategy: str, tokens: int) -> None:
    """At most twice plain PyTorch's own error, whose logits are bf16 too."""
    check(case_of(entry, dtype=torch.bfloat16, tokens=tokens), strategy=strategy, loss_chunk=16)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_factor_on_the_losses_reaches_the_norm(strategy: str) -> None:
    """Losses that the caller multiplies per example: the head's gradient is multiplied before it is measured."""
    entry, factors = zoo.LLAMA_TIED, torch.tensor([3.0, 0.5, -2.0, 1.0])

    class Scaled(nn.Module):
        """Its model's losses, each times a number of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = entry.build()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, factor: Tensor) -> Any:
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            out["loss"] = out.loss * factor
            return out

    batch = {**entry.batch(tokens=LONG), "factor": factors}

    def losses_of(model: nn.Module, rows: Any) -> Tensor:
        inner = {k: v for k, v in rows.items() if k != "factor"}
        return oracle.causal_lm_losses(getattr(model, "inner", model), inner) * rows["factor"]

    scaled = zoo.Entry("scaled", lambda attention="sdpa": Scaled().train(), lambda **_: batch, losses_of)
    case = make_case(scaled, batch)
    model = dpft.wrap(case.build(), max_grad_norm=case.max_grad_norm, strategy=strategy, loss_chunk=16)
    model(**batch).loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))
    check_stats(case, model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_passes_a_poisoned_example(strategy: str) -> None:
    """An example whose loss is NaN contributes zero; infinite logits of masked tokens are no gradient."""
    case = case_of(zoo.LLAMA, tokens=LONG)
    model = dpft.wrap(case.build(), max_grad_norm=case.max_grad_norm, strategy=strategy, loss_chunk=16)
    embeds = model.get_input_embeddings()(case.batch["input_ids"]).detach()
    embeds[1, 5] = float("nan")
    rest = {k: v for k, v in case.batch.items() if k != "input_ids"}
    model(inputs_embeds=embeds, **rest).loss.backward()
    assert dpft.stats(model).clip_factors[1] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_masked_tokens_of_infinite_logits() -> None:
    h, w = torch.randn(1, 6, 4), torch.randn(9, 4)
    h[0, 2] = float("inf")
    targets = torch.randint(0, 9, (1, 6))
    targets[0, 2] = -100
    made = chunked_head_loss(h, w, None, targets, 4, need_dh=True, need_bias=True)
    assert made.losses.isfinite().all() and made.dh is not None and made.bias is not None
    assert made.bias.isfinite().all() and (made.dh[0, 2] == 0).all() and made.dh.isfinite().all()


def test_an_example_without_labels_is_zero() -> None:
    targets = torch.full((2, 5), -100)
    targets[1] = 1
    h, w = torch.randn(2, 5, 3), torch.randn(7, 3)
    made = chunked_head_loss(h, w, None, targets, 2, need_dh=True, need_weight=True)
    assert made.losses[0] == 0 and made.dh is not None and (made.dh[0] == 0).all() and made.losses[1] > 0


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_kernel_against_float64(chunk: int) -> None:
    """Both forms, all gradients, and rounding alone between chunks."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, dim in ((2, 30, 8), (3, 5, 16), (0, 4, 4), (1, 1, 1)):
        h, w = torch.randn(batch, tokens, dim, generator=generator), torch.randn(23, dim, generator=generator)
        b = torch.randn(23, generator=generator)
        targets = torch.randint(0, 23, (batch, tokens), generator=generator)
        targets[:, : tokens // 4] = -100
        made = chunked_head_loss(h, w, b, targets, chunk, need_dh=True, need_weight=True, need_bias=True)
        assert made.dh is not None and made.bias is not None
        weight = made.weight if made.g is None else made.g.mT @ h
        assert weight is not None
        for i in range(batch):
            leaves = [t.double().requires_grad_() for t in (h[i], w, b)]
            lost = F.cross_entropy(leaves[0] @ leaves[1].mT + leaves[2], targets[i], ignore_index=-100)
            exact = torch.autograd.grad(lost, leaves)
            found = (made.losses[i], made.dh[i], weight[i], made.bias[i])
            for ours, theirs in zip(found, (lost, *exact), strict=True):
                torch.testing.assert_close(ours.double(), theirs.detach(), rtol=2e-5, atol=1e-7)


def test_kernel_refuses_shapes_that_do_not_fit() -> None:
    h, w, targets = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)
    for bad in ((h[0], w, targets, 1), (h, w[:, :3], targets, 1), (h, w, targets[:, :2], 1), (h, w, targets, 0)):
        with pytest.raises(ValueError, match="expected h"):
            chunked_head_loss(bad[0], bad[1], None, bad[2], bad[3])


def test_no_tensor_of_all_logits() -> None:
    """No storage as large as [T, V] in float32 is ever made."""
    h, w = torch.randn(1, 512, 16, requires_grad=True), torch.randn(1000, 16)
    targets = torch.randint(0, 1000, (1, 512))
    with MemoryMeter([h, w, targets]) as meter:
        made = chunked_head_loss(h, w, None, targets, 32, need_dh=True, need_weight=True)
        assert meter.peak < 0.25 * 512 * 1000 * 4
    assert isinstance(made, HeadProducts) and made.g is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_can_be_read(strategy: str) -> None:
    """They are the plain model's, before and after backward, and reading them changes nothing."""
    case = case_of(zoo.LLAMA_TIED, tokens=LONG)
    plain = case.plain(**case.batch).logits.detach()
    model = dpft.wrap(case.build(), max_grad_norm=case.max_grad_norm, strategy=strategy)
    out = model(**case.batch)
    assert is_lazy(out.logits)
    assert out.logits.shape == plain.shape and out.logits.dtype == plain.dtype and out.logits.device == plain.device
    assert out.logits.dim() == 3 and out.logits.size(-1) == zoo.VOCAB
    assert out.logits.requires_grad or strategy == "per_example"
    torch.testing.assert_close(out.logits + 0, plain, check_layout=False)
    out.loss.backward()
    torch.testing.assert_close(out.logits.argmax(-1), plain.argmax(-1))
    torch.testing.assert_close(out.logits[:, -1].detach().numpy(), plain[:, -1].numpy())
    assert is_lazy(convert_to_fp32(out.logits.detach()))
    check_grads(case, model, case.exact.factors(case.max_grad_norm))
    model.zero_grad()
    model(**case.batch).loss.backward()  # and the next step is as exact
    check_grads(case, model, case.exact.factors(case.max_grad_norm))


def test_what_nobody_computes_is_not_computed() -> None:
    """Shape, dtype, device, a conversion and a hook on the output ask for no logits."""

    def make() -> Tensor:
        raise AssertionError("the logits were computed")

    logits = LazyLogits((2, 3, 5), torch.bfloat16, torch.device("cpu"), make)
    assert logits.shape == (2, 3, 5) and logits.size(1) == 3 and logits.ndim == 3 and logits.numel() == 30
    assert logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and logits.is_floating_point()
    assert logits._base is None and not logits.requires_grad and len(logits) == 2
    assert logits.float().dtype == logits.to(torch.float32).dtype == torch.float32
    assert is_lazy(convert_to_fp32({"logits": logits})["logits"]) and is_lazy(logits.detach())
    for read in (lambda: logits + 1, lambda: logits[0], logits.tolist, logits.numpy, logits.contiguous, logits.clone):
        with pytest.raises(AssertionError, match="were computed"):
            read()


def test_a_gradient_through_read_logits_is_refused() -> None:
    case = case_of(zoo.LLAMA, tokens=LONG)
    model = dpft.wrap(case.build(), strategy="one_pass")
    out = model(**case.batch)
    with pytest.raises(dpft.ClippingError, match="clip boundary"):
        (out.loss + out.logits.mean()).backward()


def test_own_losses_from_read_logits() -> None:
    """Labels were given and the loss is the caller's own all the same."""
    case = case_of(zoo.LLAMA_TIED, tokens=LONG)
    for strategy in ("one_pass", "two_pass"):
        model = dpft.wrap(case.build(), max_grad_norm=case.max_grad_norm, strategy=strategy)
        logits = model(**case.batch).logits[:, :-1].float()
        targets = case.batch["labels"][:, 1:]
        lost = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        losses = lost.sum(1) / (targets != -100).sum(1).clamp(min=1)
        dpft.clipped_loss(model, losses).backward()
        check_grads(case, model, case.exact.factors(case.max_grad_norm))


def test_capped_logits_are_noticed_once() -> None:
    """The first forward shows that the model's loss is of other logits; from then on its head is its own."""
    model = dpft.wrap(CAPPED.build(), strategy="one_pass")
    for _ in range(2):
        out = model(**CAPPED.batch(tokens=LONG))
        assert not is_lazy(out.logits)
        out.loss.backward()


def test_evaluation() -> None:
    """Without gradients the loss is that of plain evaluation, and no logits are made for it."""
    case = case_of(zoo.LLAMA, tokens=LONG)
    model = dpft.wrap(case.build()).eval()
    with torch.no_grad():
        out = model(**case.batch)
    assert is_lazy(out.logits) and not out.loss.requires_grad
    torch.testing.assert_close(out.loss.double(), case.exact.losses.mean(), rtol=1e-5, atol=0)
    with torch.no_grad():
        plain = case.plain(**{k: v for k, v in case.batch.items() if k != "labels"})
    torch.testing.assert_close(out.logits[0], plain.logits[0])
    generated = model.generate(case.batch["input_ids"][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == LONG + 2


@pytest.mark.parametrize("change", ["unwrap", "copy", "save"])
def test_wrapped_heads_come_off(change: str) -> None:
    case = case_of(zoo.LLAMA, tokens=LONG)
    model = dpft.wrap(case.build(), max_grad_norm=case.max_grad_norm)
    if change == "unwrap":
        dpft.unwrap(model)
        out = model(**case.batch)
        assert not is_lazy(out.logits) and "_dpft_head" not in model.lm_head.__dict__
        assert "forward" not in model.lm_head.__dict__
    elif change == "copy":
        twin = copy.deepcopy(model)
        twin(**case.batch).loss.backward()
        check_grads(case, twin, case.exact.factors(case.max_grad_norm))
        assert all(p.grad is None for p in model.parameters())
    else:
        out = model(**case.batch)
        assert not is_lazy(copy.deepcopy(out.logits.detach() + 0))


def test_ghost_and_the_other_baselines_keep_their_logits() -> None:
    for clipping in ("ghost", "fast", "per_sample", "none"):
        case = case_of(zoo.LLAMA, tokens=LONG)
        model = dpft.wrap(case.build(), clipping=clipping)
        assert not is_lazy(model(**case.batch).logits)


def test_plain_training_in_chunks_if_asked_for() -> None:
    """The sum of all gradients, of several rows at once, without clipping."""
    case = case_of(zoo.LLAMA_TIED, tokens=LONG)
    model = dpft.wrap(case.build(), clipping="none", loss_chunk=4)
    out = model(**case.batch)
    assert is_lazy(out.logits)
    out.loss.backward()
    check_grads(case, model, torch.ones(len(case.exact.norms)))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "some"])
def test_a_chunk_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="loss_chunk"):
        dpft.wrap(zoo.LLAMA.build(), loss_chunk=bad)


def test_autocast() -> None:
    case = case_of(zoo.LLAMA_TIED, context=autocast_bf16, tokens=LONG)
    for strategy in STRATEGIES:
        check(case, strategy=strategy, loss_chunk=16)


def autocast_bf16() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("mutate", ["norm", "cross"])
def test_these_tests_can_fail(mutate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head left out of the norm, and the tied cross term forgotten, are seen."""
    from dpft.rules.head import ProductUse

    wrong: dict[str, tuple[str, Callable[..., Any]]] = {
        "norm": ("upper_sq_norm", lambda self, x, g, *_: torch.zeros(len(x), dtype=torch.float64)),
        "cross": ("rows_at", lambda self, ids, x, g, padding: torch.zeros(*ids.shape, x.shape[2])),
    }
    monkeypatch.setattr(ProductUse, *wrong[mutate])
    with pytest.raises(AssertionError):
        check(case_of(zoo.LLAMA_TIED, tokens=LONG), strategy="one_pass")


def test_checkpointing_recomputes_no_more_than_plain() -> None:
    """The last product of a block is not made again: the node saves before its product is made."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for wrapped in (False, True):
        case = case_of(zoo.LLAMA, tokens=LONG, examples=1)
        model = case.build()
        set_checkpointing(model, "non-reentrant")
        if wrapped:
            dpft.wrap(model, strategy="one_pass")
        with FlopCounterMode(display=False) as counter:
            model(**case.batch).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]
