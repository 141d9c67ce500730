"""Measures of synthetic data, which compare with private records, and the folder that is published."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.labelled import ENCODER
from finetune.options import BASE_MODEL
from finetune.synthetic.card import Made, card, write
from finetune.synthetic.checks import Rules
from finetune.synthetic.conditions import (
    Conditions,
)
from finetune.synthetic.downstream import Classifier, Labelled
from finetune.synthetic.generation import Sampling
from finetune.synthetic.measures import (
    clusters,
    distance,
    embed,
    frontier_area,
    lengths,
    longest_runs,
    overlap,
    total_variation,
)

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def sentence(draw: random.Random, words: int = 30) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def test_a_planted_copy_is_found_to_the_word() -> None:
    draw = random.Random(2)
    private = [sentence(draw) for _ in range(40)]
    fresh = [" ".join(f"word{draw.randrange(9999)}" for _ in range(30)) for _ in range(20)]
    planted = [*fresh[:-1], "before " + " ".join(private[7].split()[5:22]).upper() + " after"]
    runs = longest_runs(planted, private)
    assert runs[-1] == 17 and max(runs[:-1]) == 0
    assert overlap(planted, private) == {
        "median": 0.0,
        "0.95 quantile": pytest.approx(float(np.quantile(runs, 0.95))),
        "longest": 17.0,
        "share with 13 words in a row": 1 / 20,
    }
    assert longest_runs([private[3]], private) == [30]
    # a run does not go on into the next record
    assert longest_runs(["a b c d"], ["x a b", "c d x"]) == [2]
    assert longest_runs(["", "a"], [""]) == [0, 0]


def test_longest_runs_are_those_of_all_pairs() -> None:
    draw = random.Random(3)
    texts, corpus = ([sentence(draw, draw.randint(0, 25)) for _ in range(15)] for _ in range(2))

    def brute(text: str) -> int:
        words, best = text.split(), 0
        for other in (some.split() for some in corpus):
            for i in range(len(words)):
                for j in range(len(other)):
                    n = 0
                    while i + n < len(words) and j + n < len(other) and words[i + n] == other[j + n]:
                        n += 1
                    best = max(best, n)
        return best

    assert longest_runs(texts, corpus) == [brute(text) for text in texts]


def test_distributions() -> None:
    assert total_variation("aab", "aab") == 0 and total_variation("aa", "bb") == 1
    assert total_variation("aaab", "ab") == pytest.approx(0.25)
    short, long = ["one two"] * 10, [f"{'w ' * n}" for n in range(1, 30)]
    assert lengths(long, long)["total variation"] == 0 and lengths(short, long)["total variation"] > 0.8
    assert lengths(short, long)["quantiles 0.05, 0.25, 0.5, 0.75, 0.95"] == [2.0] * 5


def test_the_distance_is_1_for_the_same_and_falls_with_the_difference() -> None:
    same = np.array([0.2, 0.3, 0.5])
    assert frontier_area(same, same) == pytest.approx(1, abs=1e-9)
    assert frontier_area(np.array([1.0, 0.0]), np.array([0.0, 1.0])) < 0.01
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 8, generator=generator)
    assert distance(points, points) == pytest.approx(1, abs=1e-6)
    alike = distance(points, torch.randn(300, 8, generator=generator))
    near = distance(points, torch.randn(300, 8, generator=generator) + 0.7)
    far = distance(points, torch.randn(300, 8, generator=generator) + 5)
    assert 0.7 < alike <= 1 and far < 0.05 and far < near < alike


def test_clusters_are_those_that_were_planted() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = (centres[:, None] + torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))).reshape(-1, 2)
    owner = clusters(points, 3, seed=0).reshape(3, 40)
    assert (owner == owner[:, :1]).all() and len(owner[:, 0].unique()) == 3
    assert clusters(torch.zeros(5, 2), 3, seed=0).tolist() == [0] * 5


def test_an_embedding_does_not_depend_on_the_texts_beside_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    texts = ["Return the value.", "A longer text, which is there for the padding of the first."]
    both, alone = embed(model, tokenizer, texts, 64), embed(model, tokenizer, texts[:1], 64)
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


def test_a_classifier_learns_from_labels_that_fit_and_from_others_not() -> None:
    texts = [f"{word} {other}" for word in ("import", "return") for other in WORDS * 3]
    labels = ["a"] * 30 + ["b"] * 30
    classifier = Classifier(str(ENCODER), steps=25, batch_size=16, seq_len=8)
    fits = classifier.score(Labelled(texts, labels), Labelled(texts, labels), ["a", "b"], seed=0)
    swapped = classifier.score(Labelled(texts, labels[::-1]), Labelled(texts, labels), ["a", "b"], seed=0)
    assert fits["accuracy"] > 0.95 and fits["macro F1"] > 0.95 and swapped["accuracy"] < 0.05
    some = Labelled(texts, labels).some(7, seed=1)
    assert len(some.texts) == 7 and all(
        labels[texts.index(x)] == y for x, y in zip(some.texts, some.labels, strict=True)
    )
    assert sorted(Labelled(texts, labels).some(99, seed=1).texts) == sorted(texts)


# --- the folder that is published


def made(**changed: object) -> Made:
    fields = {
        "model": "the base model",
        "data": "mails",
        "statement": "## Privacy statement\n\nepsilon 8",
        "private": True,
        "conditions": Conditions({"label": ("a", "b")}),
        "values_from_data": False,
        "distribution": "a uniform distribution",
        "sampling": Sampling(seed=5),
        "rules": Rules(("label",), must_match="x"),
        "generated": 9,
        "kept": (2, 1),
        "cut": 1,
        "rejected": {"too short": 6},
        "versions": "torch",
    }
    return Made(**{**fields, **changed})  # type: ignore[arg-type]  # a dictionary for brevity


def test_the_folder_has_the_texts_and_the_card_and_nothing_else(tmp_path: Path) -> None:
    rows = [{"label": "a"}, {"label": "a"}, {"label": "b"}]
    write(tmp_path / "synthetic", rows, ["one", "two", "three\nlines"], "body", made())
    assert sorted(path.name for path in (tmp_path / "synthetic").iterdir()) == ["README.md", "synthetic.parquet"]
    read = load_dataset("parquet", data_files=str(tmp_path / "synthetic" / "synthetic.parquet"), split="train")
    assert read.column_names == ["label", "body"] and read[2] == {"label": "b", "body": "three\nlines"}
    text = (tmp_path / "synthetic" / "README.md").read_text()
    for part in (
        "## Privacy statement",
        "epsilon 8",
        "too short: 6",
        "seed 5",
        "must match 'x'",
        "| a | 2 |",
        "3 texts",
    ):
        assert part in text
    assert str(tmp_path) not in text
    (tmp_path / "synthetic" / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError, match="published whole"):
        write(tmp_path / "synthetic", rows, ["one", "two", "three"], "body", made())


def test_the_card_says_what_is_not_private_and_what_became_public() -> None:
    text = card(made(private=False))
    assert "WITHOUT PRIVACY" in text and "NOT PRIVATE" in text and "post-processing" not in text
    assert "taken from the private records" in card(made(values_from_data=True))
    assert "taken from the private records" not in card(made())
