"""What texts are worth for training: a small classifier, trained on them and tested on private records held out.

Not private: the tests, and the classifier that is trained on real records. For whoever trains, not for publication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from finetune.data.labelled import load_classifier, measure


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
        """Accuracy and F1 (mean of the classes) on ``test`` after training on ``train``.

        Args:
            train: texts to learn from.
            test: real records that were held out.
            names: of all classes.
            seed: of the head and the order of the texts.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        number = {name: i for i, name in enumerate(names)}
        with torch.random.fork_rng(devices=[self.device] if self.device.startswith("cuda") else []):
            torch.manual_seed(seed)  # the head's, and dropout's
            model: nn.Module = load_classifier(self.model, list(names), "all").to(self.device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
            scheduler = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, self.steps)
            for _ in range(self.steps):
                chosen = torch.randint(len(train.texts), (self.batch_size,)).tolist()
                labels = torch.tensor([number[train.labels[i]] for i in chosen], device=self.device)
                loss = nn.functional.cross_entropy(
                    self._logits(model, tokenizer, [train.texts[i] for i in chosen]), labels
                )
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of a batch: this training is not private
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                parts = [test.texts[at : at + 128] for at in range(0, len(test.texts), 128)]
                logits = torch.cat([self._logits(model, tokenizer, part) for part in parts]).cpu()
        labels = torch.tensor([number[label] for label in test.labels])
        return measure(SimpleNamespace(predictions=logits.numpy(), label_ids=labels.numpy()))

    def _logits(self, model: nn.Module, tokenizer: AutoTokenizer, texts: Sequence[str]) -> torch.Tensor:
        """``[texts, classes]`` float32."""
        batch = tokenizer(
            list(texts),
            truncation=True,
            max_length=self.seq_len,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).logits.float()
