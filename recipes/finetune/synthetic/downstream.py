"""What texts are worth for training: a small classifier, trained on them and tested on private records held out.

Not private: the tests, and the classifier that is trained on real records. For whoever trains, not for publication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from finetune.classification import figures, predictions
from finetune.data.labelled import load_classifier, make_label_collate, tokenised
from finetune.materials import pad_token


@dataclass(frozen=True)
class Labelled:
    """Texts with labels.

    Attributes:
        texts: of the records.
        labels: the value of each.
    """

    texts: Sequence[str]
    labels: Sequence[str]

    def some(self, number: int, seed: int) -> Labelled:
        """So many of them, drawn at random; all where there are fewer."""
        order = torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed))[:number].tolist()
        return Labelled([self.texts[i] for i in order], [self.labels[i] for i in order])


@dataclass(frozen=True)
class Classifier:
    """A classifier and its training: the same one for all the texts that are compared.

    Attributes:
        model: folder, or name on the hub.
        steps: of AdamW, with a cosine schedule.
        batch_size: texts of a step.
        learning_rate: peak.
        seq_len: tokens at which a text is cut.
        device: to train on.
    """

    model: str
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 2e-3
    seq_len: int = 64
    device: str = "cpu"

    def score(self, train: Labelled, test: Labelled, names: Sequence[str], seed: int) -> dict[str, float]:
        """Accuracy and macro F1 on ``test`` after training on ``train``.

        Args:
            train: texts to learn from.
            test: real records that were held out.
            names: of all classes.
            seed: of the head and the order of the texts.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        number = {name: i for i, name in enumerate(names)}
        collate = make_label_collate(pad_token(tokenizer))

        def rows(some: Labelled) -> Dataset:
            labels = [number[label] for label in some.labels]
            return tokenised(Dataset.from_dict({"text": list(some.texts), "label": labels}), tokenizer, self.seq_len)

        examples = list(rows(train))
        with torch.random.fork_rng(devices=[self.device] if self.device.startswith("cuda") else []):
            torch.manual_seed(seed)  # the head's, dropout's, the order's
            model: nn.Module = load_classifier(self.model, list(names), "all").to(self.device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
            scheduler = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, self.steps)
            for _ in range(self.steps):
                chosen = torch.randint(len(examples), (self.batch_size,)).tolist()
                batch = collate([examples[i] for i in chosen])
                model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of a batch: this training is not private
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        scores = figures(*predictions(model, list(rows(test)), collate))
        return {name: scores[name] for name in ("accuracy", "macro F1")}
