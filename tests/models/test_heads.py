"""The loss of every head: exact against the float64 oracle in every strategy, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dpft
from tests import oracle, zoo
from tests.clipping.against_oracle import FLOAT32_LIMIT, STRATEGIES, case_of, check, check_grads, make_case
from tests.models import heads

ENTRIES = {str(entry): entry for entry in heads.EXACT}
norm_strategies = pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", heads.EXACT, ids=str)
def test_exact(entry: zoo.Entry, strategy: str) -> None:
    """The value of the loss, the norms and the clipped sum."""
    check(case_of(entry), strategy=strategy)


@pytest.mark.slow  # as the others in all else: the checkpoints of one head are like the next one's
@norm_strategies
@pytest.mark.parametrize("entry", heads.EXACT, ids=str)
def test_exact_checkpointed(entry: zoo.Entry, strategy: str) -> None:
    check(case_of(entry), "non-reentrant", strategy=strategy)


@norm_strategies
@pytest.mark.parametrize(("entry", "why"), heads.REFUSED, ids=str)
def test_refused(entry: zoo.Entry, why: str, strategy: str) -> None:
    with pytest.raises(dpft.DPFTError, match=why):
        dpft.wrap(entry.build(), strategy=strategy)(**entry.batch()).loss.backward()


@pytest.mark.parametrize("strategy", ["per_example", "auto"])
@pytest.mark.parametrize(("entry", "why"), heads.REFUSED, ids=str)
def test_what_is_refused_is_exact_one_by_one(entry: zoo.Entry, why: str, strategy: str) -> None:
    """Of its own accord only where the losses of a batch are those of its examples."""
    if (
        strategy == "auto"
        and why in ("a selection of tokens", "computed its own loss")
        and "ModernBert" not in str(entry)
    ):
        with pytest.raises(dpft.DPFTError, match=why):
            dpft.wrap(entry.build())(**entry.batch())
        return
    check(case_of(entry), strategy=strategy)


@pytest.mark.parametrize("frozen", ["", "vision_tower"])
def test_several_images_in_a_row(frozen: str) -> None:
    """Which row an image belongs to, only its text knows: in physical batches of one."""
    text = {name: value[:1] for name, value in ENTRIES["Llava"].batch().items() if name != "pixel_values"}
    two = {name: torch.cat([value[:, :4], value], 1) for name, value in text.items()} | heads.pixels(2)

    def build(attention: str) -> torch.nn.Module:
        model = ENTRIES["Llava"].build(attention)
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or frozen not in name)
        return model

    plain = build("sdpa").double()
    with oracle.Float64():
        plain(**{name: v.double() if v.is_floating_point() else v for name, v in two.items()}).loss.backward()
    exact = oracle.grads_of(plain)
    norm = torch.stack([g.square().sum() for g in exact.values()]).sum().sqrt()
    for strategy in ("one_pass", "two_pass", "auto"):
        model = dpft.wrap(build("sdpa"), strategy=strategy, max_grad_norm=float(norm) / 2)  # type: ignore[arg-type]  # a parameter
        model(**two).loss.backward()
        assert oracle.relative_error(oracle.grads_of(model), {n: g / 2 for n, g in exact.items()}) <= FLOAT32_LIMIT
    several = {name: torch.cat([value, value]) for name, value in two.items()}
    with pytest.raises(dpft.ClippingError, match="physical batches of one"):
        dpft.wrap(build("sdpa"))(**several)


def test_lora_with_a_trained_head() -> None:
    """PEFT's copy of the classifier, and factors in the layers below."""
    peft = pytest.importorskip("peft")

    def build(attention: str) -> torch.nn.Module:
        config = peft.LoraConfig(
            r=2, lora_dropout=0.0, init_lora_weights=False, target_modules=["q_proj"], task_type="SEQ_CLS"
        )
        return peft.get_peft_model(ENTRIES["LlamaForSequenceClassification"].build(attention), config)

    batch = heads.classes(heads.tokens())
    check(make_case(zoo.Entry("lora", zoo.seeded(build), lambda **_: batch, heads.own_losses), batch))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["BertForTokenClassification", "ModernBertForMaskedLM", "T5, text to text"])
def test_an_example_without_targets(name: str, strategy: str) -> None:
    """Loss 0, gradient 0, and the others as they were; transformers would give NaN."""
    entry = ENTRIES[name]
    batch = entry.batch()
    case = case_of(entry)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    loss = model(**batch).loss
    others = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loss.detach().double(), (case.exact.losses * others).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert dpft.stats(model).norms[1] == 0
    check_grads(case, model, case.exact.factors(case.max_grad_norm) * others)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_answer_outside_of_the_text(strategy: str) -> None:
    """As in transformers no target: behind the batch's last column, or in a row's padding."""
    entry = ENTRIES["BertForQuestionAnswering"]
    batch = entry.batch()
    batch["start_positions"][1] = batch["end_positions"][1] = heads.TOKENS + 5
    batch["start_positions"][2] = batch["end_positions"][2] = int(batch["attention_mask"][2].sum()) + 1
    assert batch["start_positions"][2] < heads.TOKENS
    case = case_of(entry)
    model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.detach().double(), case.exact.losses[0] / 3, rtol=1e-5, atol=0)
    loss.backward()
    assert (dpft.stats(model).norms[1:] == 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["Bert, regression", "Llama, regression", "BertForQuestionAnswering"])
def test_a_batch_of_one(name: str, strategy: str) -> None:
    """A squeezed number is a scalar then."""
    entry = ENTRIES[name]
    check(make_case(entry, oracle.row(entry.batch(), 1)), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_a_padding_row(name: str, strategy: str) -> None:
    """A row of weight 0, without a token, counts in neither the loss nor the sum."""
    entry = ENTRIES[name]
    case = case_of(entry)
    batch = {k: torch.cat([v, torch.zeros_like(v[:1])]) for k, v in entry.batch().items()}
    model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    loss = model(**batch, example_weight=torch.tensor([1.0, 1.0, 1.0, 0.0])).loss
    torch.testing.assert_close(loss.detach().double(), case.exact.losses.mean(), rtol=1e-5, atol=0)
    loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "LlamaForTokenClassification", "T5, text to text", "Llava"])
def test_the_number_of_items_in_the_batch_is_not_used(name: str, strategy: str) -> None:
    entry = ENTRIES[name]
    case = case_of(entry)
    model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    model(**entry.batch(), num_items_in_batch=torch.tensor(1000)).loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))


@norm_strategies
def test_padding_does_not_matter(strategy: str) -> None:
    """More columns of padding give the same sum, also of answers, which transformers seeks among the padding, too."""
    for name in ("BertForQuestionAnswering", "ModernBertForQuestionAnswering", "BertForTokenClassification"):
        entry = ENTRIES[name]
        case = case_of(entry)
        wider = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {
            k: torch.nn.functional.pad(v, (0, 4), value=wider[k]) if k in wider else v
            for k, v in entry.batch().items()
        }
        model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
        model(**batch).loss.backward()
        check_grads(case, model, case.exact.factors(case.max_grad_norm))


def test_tuples() -> None:
    entry = ENTRIES["BertForQuestionAnswering"]
    case = case_of(entry)
    for strategy in STRATEGIES:
        model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
        loss, start = model(**entry.batch(), return_dict=False)[:2]
        assert start.shape == (heads.EXAMPLES, heads.TOKENS)
        loss.backward()
        check_grads(case, model, case.exact.factors(case.max_grad_norm))


def test_answers_are_returned_in_every_strategy() -> None:
    entry = ENTRIES["BertForQuestionAnswering"]
    found: list[Tensor] = []
    for strategy in STRATEGIES:
        found.append(dpft.wrap(entry.build(), strategy=strategy)(**entry.batch()).end_logits.detach())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@torch.no_grad()
def test_evaluation_is_that_of_transformers() -> None:
    for name in ("BertForTokenClassification", "BertForQuestionAnswering", "T5, text to text"):
        entry = ENTRIES[name]
        plain = entry.build().eval()
        assert torch.equal(dpft.wrap(entry.build()).eval()(**entry.batch()).loss, plain(**entry.batch()).loss)


def test_bf16() -> None:
    """Losses are computed in float32, as a causal LM's."""
    for name in ("BertForTokenClassification", "BertForQuestionAnswering", "Bert, several labels"):
        entry = ENTRIES[name]
        check(make_case(entry, entry.batch(), dtype=torch.bfloat16), strategy="two_pass")


def test_the_limit_is_tight_enough_to_see_a_mean_over_the_batch() -> None:
    """Means over the batch's tokens are far from what is expected here: the tests above would be red."""
    entry = ENTRIES["BertForTokenClassification"]
    case = case_of(entry)
    model = entry.build()
    model(**entry.batch()).loss.backward()
    means = {n: g * heads.EXAMPLES for n, g in oracle.grads_of(model).items()}
    assert oracle.relative_error(means, case.exact.weighted_sum(torch.ones(heads.EXAMPLES))) > 1000 * FLOAT32_LIMIT
