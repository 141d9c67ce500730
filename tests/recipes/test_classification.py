"""Texts with labels: what is read, trained, weighed and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import classify_dp
import dpft
from finetune.classification import Classification, ClassifyOptions, figures, weights_of
from finetune.data.labelled import ENCODER, PACKAGES, labelled, load_classifier
from finetune.data.loading import load_texts
from finetune.parsing import parse
from tests.engines.launching import ROOT, launch, succeed

RECIPE = ROOT / "tests" / "engines" / "recipe_on_cpu.py"


@pytest.fixture
def mails(tmp_path: Path) -> str:
    rows = [f"{kind} number {i} of the {kind}s,{kind}" for i in range(30) for kind in ("apple", "stone")]
    (tmp_path / "mails.csv").write_text("\n".join(["body,folder", *rows]))
    return str(tmp_path / "mails.csv")


def words_of(mails: str, output: Path, *more: str) -> list[str]:
    words = ["--dataset", mails, "--text-column", "body", "--label-column", "folder", "--output-dir", str(output)]
    return [*words, "--num-steps", "2", "--expected-batch-size", "16", "--noise-multiplier", "1", *more]


def test_a_file_of_words_and_labels(mails: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert classify_dp.main(words_of(mails, output, "--class-weights", "apple=3", "--cpu-threads", "1")) == 0
    told = capsys.readouterr().out
    assert "accuracy" in told and "macro F1" in told and "calibration error" in told and "without privacy" in told
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "apple", 1: "stone"}
    card = (output / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "were taken from the records" in card
    assert "recipes/classify_dp.py" in card and "## Samples" not in card
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in rows if "validation_loss" in row)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "more"), [("ddp", []), ("fsdp2", ["--lora-r", "2"])])
def test_two_processes(engine: str, more: list[str], mails: str, tmp_path: Path) -> None:
    """The demonstration's comparison is left out. The run compares the exported model's loss."""
    words = words_of(mails, tmp_path / "out", "--checkpoint-every", "2", *more)
    told = succeed(launch(engine, RECIPE, "--recipe", "classify_dp", *words, scratch=tmp_path, timeout=200))
    assert "validation loss after" in told and "without privacy" not in told
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label-column", "kind"], "--label-column 'kind': the data has the columns body, folder"),
        (["--labels", "apple,plum"], "1 labels of the records are none of them"),
        (["--label-column", "body", "--labels", "a,b"], "labels of the records are none"),
        (["--class-weights", "plum=2"], "'plum' is no label"),
        (["--class-weights", "apple=0"], "expected a number above 0"),
        (["--class-weights", "apple=many"], "expected a number above 0"),
        (["--pack", "documents"], "--pack"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], message: str, mails: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        classify_dp.main(words_of(mails, tmp_path / "out", *words))
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_labels_are_the_packages(docstrings: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.loading.stdlib_docstrings", lambda: docstrings)
    train, test, names = labelled(*load_texts("docstrings", validation_share=0.2), "docstrings", "text", "label")
    assert names == list(PACKAGES) and set(train["label"]) == set(range(len(names)))
    assert not set(train["text"]) & set(test["text"])


def test_one_label_is_refused() -> None:
    records = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "x"]})
    with pytest.raises(ValueError, match="one label only"):
        labelled(records, records, "file.csv", "text", "label")


@pytest.mark.parametrize(("train", "trained"), [("all", None), ("top", "layer.2"), ("head", "classifier")])
def test_what_is_trained(train: str, trained: str | None) -> None:
    model = load_classifier(str(ENCODER), ["a", "b"], train)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in names) and any("pooler" in name for name in names)
    assert any("layer.2." in name for name in names) == (train != "head")
    assert any("layer.0." in name for name in names) == (trained is None)


def test_figures_by_definition_and_by_hand() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet(np.ones(4), 200))
    labels = torch.from_numpy(rng.integers(0, 4, 200))
    found = figures(probabilities, labels)
    guesses, truth = probabilities.argmax(1).numpy(), labels.numpy()
    scores = []
    for kind in range(4):
        precision = np.mean(truth[guesses == kind] == kind)
        recall = np.mean(guesses[truth == kind] == kind)
        scores.append(2 * precision * recall / (precision + recall))
    assert found["macro F1"] == pytest.approx(float(np.mean(scores)))
    assert found["accuracy"] == pytest.approx(float(np.mean(guesses == truth)))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.nll_loss(probabilities.log(), labels)))
    # two records at confidence 0.9, one right; one at 0.6, right: (|1.8 - 1| + |0.6 - 1|) / 3
    by_hand = figures(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]).double(), torch.tensor([0, 1, 0]))
    assert by_hand["calibration error"] == pytest.approx(1.2 / 3)


def test_a_weight_scales_its_own_example_alone() -> None:
    """torch's own weighted mean divides by the weights of the whole batch: an example would change the others'."""
    recipe = Classification()
    recipe.names, recipe.weights = ["a", "b"], weights_of("b=5", ["a", "b"])
    model = load_classifier(str(ENCODER), recipe.names, "head").eval()
    ids = torch.arange(10, 26).reshape(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    both = recipe.losses(model, batch)
    alone = torch.cat([recipe.losses(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)])
    assert torch.allclose(both, alone, atol=1e-6)
    recipe.weights = None
    assert torch.allclose(both / recipe.losses(model, batch), torch.tensor([1.0, 5.0]), atol=1e-5)


def test_options_of_the_recipe_and_those_that_it_does_not_have() -> None:
    options = parse(["--seq_len", "32", "--per_device_train_batch_size", "4"], options=ClassifyOptions)
    assert isinstance(options, ClassifyOptions)
    assert (options.seq_len, options.max_physical_batch_size, options.num_steps) == (32, 4, 60)
    with pytest.raises(SystemExit):
        parse(["--max-tokens-in-memory", "5"], options=ClassifyOptions)


def test_the_clipped_sum_is_that_of_weighted_losses() -> None:
    """Where no gradient reaches C, it is the gradient of the sum of the weighted losses."""
    recipe = Classification()
    recipe.names, recipe.weights = ["a", "b"], weights_of("b=0.25", ["a", "b"])
    ids = torch.arange(10, 26).reshape(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    gradients = []
    for private in (True, False):
        torch.manual_seed(0)  # pooler and head are new
        model = load_classifier(str(ENCODER), recipe.names, "head", dtype=torch.float64)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if private:
            dpft.wrap(model, max_grad_norm=1e6)
            dpft.clipped_loss(model, recipe.losses(model, batch)).backward()
        else:
            recipe.losses(model, batch).sum().backward()
        gradients.append(model.classifier.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-6)
