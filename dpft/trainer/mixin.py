"""``PrivateMixin``: what a Trainer class needs to train with one private release per step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import DPFTError, PrivacyConfigError
from dpft.loader import PrivateDataLoader, check_dataset
from dpft.prepare import prepare
from dpft.privacy import PrivacyConfig, privacy_statement_markdown
from dpft.trainer import losses
from dpft.trainer.arguments import apply_rules, set_steps
from dpft.trainer.callback import PrivacyCallback
from dpft.trainer.lengths import lengths_of
from dpft.trainer.steps import LogicalBatch, Steps

logger = logging.getLogger(__name__)

LEDGER, STATE, REPORT = "privacy_ledger.jsonl", "privacy_run.json", "privacy_report.json"
NOT_PRIVATE = (
    "the training loss in logs and trainer_state.json, and every metric of an evaluation, are computed from records "
    "without noise: no epsilon covers them, and they are not for publication"
)
BEST_CHOSEN = (
    "the published weights were chosen among checkpoints by an evaluation metric (load_best_model_at_end): if its "
    "data are private, that choice is covered by no epsilon"
)
_METRICS = ("trainer_state.json", "*_results.json", "comparison.json", "runs")
# Keys of the logs that depend on no record.
_PUBLIC = frozenset({"epoch", "step", "epsilon", "learning_rate"})


class PrivateMixin:
    """In front of a Trainer class in its bases: one step is one logical batch, with one release.

    Args:
        privacy: everything that affects the privacy; left out exactly with :class:`dpft.DPTrainingArguments`.
        privacy_options: further arguments of :func:`dpft.prepare`: ``ledger_path`` (default: in ``output_dir``),
            ``continue_ledger``, ``strategy``, ``clipping``, ``memory``, ``loss_chunk``, ``isolation``,
            ``lengths``, ``static_shapes``, ``sums_device``, ``account``, ``test_seed``.
        *args: of the Trainer.
        **kwargs: of the Trainer.

    Raises:
        PrivacyConfigError: an argument that a private training cannot have; says what to use instead.
    """

    # What the Trainer class brings.
    args: Any
    accelerator: Any
    model: Any
    state: Any
    control: Any
    train_dataset: Any
    data_collator: Any
    callback_handler: Any
    is_in_train: bool
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        privacy: PrivacyConfig | None = None,
        privacy_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.private_loader: PrivateDataLoader | None = None
        super().__init__(*args, **kwargs)
        made = getattr(self.args, "privacy", None)
        if privacy is not None and callable(made):  # one of them would be ignored, such as a smaller epsilon
            raise PrivacyConfigError(
                f"{type(self).__name__} got privacy=, and args={type(self.args).__name__}(...), whose fields declare "
                "it too; expected one of them. Give args as transformers.TrainingArguments, or leave privacy out."
            )
        if privacy is None and callable(made):
            privacy = made()
        if privacy is None:
            raise PrivacyConfigError(
                f"{type(self).__name__} got no privacy; pass privacy=dpft.PrivacyConfig(...), or "
                "args=dpft.DPTrainingArguments(...)."
            )
        self.privacy, self.privacy_options = privacy, dict(privacy_options or {})
        self._losses = losses.find(self)
        apply_rules(self.args, privacy)
        if self.train_dataset is not None:
            check_dataset(self.train_dataset)
            set_steps(self.args, privacy.steps(len(self.train_dataset)))
        self.add_callback(PrivacyCallback(self))  # type: ignore[attr-defined]  # of the Trainer

    # ----------------------------------------------------------------------------------------- what Trainer calls
    def get_train_dataloader(self) -> Steps:
        """The logical batches; :func:`dpft.prepare` makes the loader behind them."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        rate = self.privacy.rate(len(self.train_dataset))
        per_epoch = max(1, math.ceil(1 / rate - 1e-9))
        return Steps(self.train_dataset, per_epoch, lambda: int(self.state.global_step), self._prepared_loader)

    def _prepared_loader(self) -> PrivateDataLoader:
        assert self.private_loader is not None
        return self.private_loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Examples of a step, in expectation."""
        return round(self.privacy.expected_batch_size)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.private_loader is not None:
            raise PrivacyConfigError(
                f"this {type(self).__name__} has trained: its budget is spent, or was begun. Make a new one, with "
                "another ledger_path; or resume by train(resume_from_checkpoint=...) in a new process."
            )
        with self._preparing_privately():
            model, steps = super()._prepare_for_training(  # type: ignore[misc]  # of the Trainer
                max_steps, train_dataloader, resume_from_checkpoint
            )
        loader = self._prepared_loader()
        if resume_from_checkpoint is not None:
            loader.privacy.load_state_dict(self._read_state(Path(resume_from_checkpoint)))
            lost = loader.privacy.steps - self.state.global_step
            if lost:
                logger.warning(
                    "the ledger has %d releases that are not in this checkpoint: they stay spent, and the training "
                    "ends %d steps earlier",
                    lost,
                    lost,
                )
        return model, steps

    @contextmanager
    def _preparing_privately(self) -> Iterator[None]:
        """While Trainer prepares model and optimiser, ``accelerator.prepare`` is :func:`dpft.prepare`."""
        accelerator = self.accelerator

        def prepare_privately(*objects: Any, **kwargs: Any) -> Any:
            del accelerator.prepare  # dpft.prepare calls Accelerate's
            models = [o for o in objects if isinstance(o, nn.Module)]
            if len(models) != 1 or len(objects) != 2 or kwargs:
                raise PrivacyConfigError(
                    f"Trainer prepares {[type(o).__name__ for o in objects]}; expected a model and its optimiser. "
                    "Leave 'optimizer' and 'scheduler' out of the DeepSpeed configuration, and FSDP at version 2."
                )
            config = getattr(accelerator, "parallelism_config", None)
            if max(getattr(config, name, 1) or 1 for name in ("sp_size", "cp_size")) > 1:
                raise PrivacyConfigError(
                    "ParallelismConfig spreads an example over ranks, where Trainer splits batches and computes the "
                    "loss by itself. Use dpft.prepare in a loop of your own, or recipes/llama_dp.py."
                )
            model, optimizer = objects
            dataset, collate = self._training_examples()
            options = {"ledger_path": Path(self.args.output_dir) / LEDGER} | self.privacy_options
            if "lengths" not in options and self.args.train_sampling_strategy == "group_by_length":
                options["lengths"] = lengths_of(self)
            prepared, stepped, self.private_loader = prepare(
                accelerator,
                model,
                optimizer,
                dataset,
                self.privacy,
                collate_fn=self._losses.collate(collate),
                max_physical_batch_size=self.args.per_device_train_batch_size,
                num_workers=self.args.dataloader_num_workers,
                **options,
            )
            return prepared, stepped

        accelerator.prepare = prepare_privately
        try:
            yield
        finally:
            accelerator.__dict__.pop("prepare", None)

    def _training_examples(self) -> tuple[Any, Any]:
        """Dataset and collator, without the columns that the model does not take, as Trainer's own loader has them."""
        from datasets import Dataset

        host: Any = self
        if isinstance(self.train_dataset, Dataset):
            return host._remove_unused_columns(self.train_dataset, description="training"), self.data_collator
        collate = host._get_collator_with_removed_columns(self.data_collator, description="training")
        return self.train_dataset, collate

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one logical batch, a physical one at a time.

        Returns:
            ``[]``, the mean of the losses of this process's examples; not private.
        """
        if not isinstance(inputs, LogicalBatch):
            raise DPFTError("a private training step takes a LogicalBatch of get_train_dataloader")
        total, examples = None, 0
        for batch in inputs:
            weights = batch["example_weight"]
            loss = super().training_step(model, batch, None)  # type: ignore[misc]  # of the Trainer
            count = (weights > 0).sum().to(loss.device)
            total = loss * count if total is None else total + loss * count
            examples = examples + count
            if not self._prepared_loader().is_last:
                self.optimizer.step()  # ends a physical batch; Trainer steps after the last one
        assert total is not None
        return total / torch.as_tensor(examples).clamp(min=1)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the loss whose backward gives the clipped sum; in an evaluation the Trainer's own."""
        if self.private_loader is not None and self.is_in_train and torch.is_grad_enabled():
            return self._losses.private(self, model, inputs)
        inputs = {name: value for name, value in inputs.items() if name != "example_weight"}
        return super().compute_loss(  # type: ignore[misc]  # of the Trainer
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None  # an example's loss is its own; see arguments._no_token_average

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None  # examples are clipped; clipping the noisy sum would only weaken the signal

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None  # of a sum that is not released yet

    def floating_point_ops(self, inputs: Any) -> int:
        """0: counted in tokens, it would tell how many were drawn."""
        return 0

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: each trial is a training of its own, and choosing among a fixed number is not accounted for."""
        raise PrivacyConfigError(
            "hyperparameter_search trains once for each trial on the private data, and no accountant here covers its "
            "choice among them. Use dpft.tune, search on public data, or train with settings chosen beforehand."
        )

    # ----------------------------------------------------------------------------------------- what is written
    @property
    def epsilon(self) -> float:
        """Spent so far, exactly, at the schedule's delta; 0 before training."""
        return 0.0 if self.private_loader is None else self.private_loader.privacy.epsilon(exact=True)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With ``epsilon``: of training steps an upper bound that costs nothing, in the last line exact."""
        if self.private_loader is not None and self.is_in_train and "loss" in logs:
            logs["epsilon"] = self.private_loader.privacy.epsilon()
        elif self.private_loader is not None and "train_runtime" in logs:
            logs["epsilon"] = self.epsilon
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # of the Trainer

    def privacy_report(self) -> dict[str, Any]:
        """The report for a model card, as :func:`dpft.privacy_report`.

        Raises:
            PrivacyConfigError: nothing was trained.
        """
        if self.private_loader is None:
            raise PrivacyConfigError("there is no privacy report before training; call train() first")
        notes = [NOT_PRIVATE]
        if self.args.load_best_model_at_end or str(getattr(self.args.save_strategy, "value", "")) == "best":
            notes.append(BEST_CHOSEN)
        return self.private_loader.privacy.report(notes=tuple(notes))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]  # of the Trainer
        if self.private_loader is not None and self.args.should_save:
            state = self.private_loader.privacy.state_dict()
            (Path(output_dir) / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / STATE
        if not path.exists():
            raise PrivacyConfigError(
                f"{path} is missing: the checkpoint {checkpoint} is not one of a private training, or was saved with "
                "save_only_model. To start a private training from these weights, load them as the model."
            )
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with ``privacy_report.json`` beside the weights.

        Under FSDP with sharded states, where Trainer writes none, the whole weights are written too, unless it is a
        checkpoint, which has the shards.
        """
        host: Any = self
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]  # of the Trainer
        if host.is_fsdp_enabled and not _internal_call:
            plugin = self.accelerator.state.fsdp_plugin
            if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                weights = self.accelerator.get_state_dict(host.model_wrapped)
                if self.args.should_save:
                    host._save(output_dir, state_dict=weights)
        if self.private_loader is not None:
            report = self.privacy_report()
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which publishes all of ``output_dir``, unless there are metrics in it.

        Raises:
            PrivacyConfigError: names the files, whose values were computed from records without noise.
        """
        folder = Path(self.args.output_dir)
        found = sorted(path.name for pattern in _METRICS for path in folder.glob(pattern))
        if self.private_loader is not None and found:
            raise PrivacyConfigError(
                f"push_to_hub publishes all of {str(folder)!r}, and {found} hold losses or metrics that were computed "
                "from records without noise. Move them elsewhere first (save_state, save_metrics write them)."
            )
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]  # of the Trainer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, without the results that no epsilon covers, and with the privacy statement."""
        if self.private_loader is None:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]  # of the Trainer
            return
        history, metrics = self.state.log_history, self.state.best_metric
        self.state.log_history = [{k: v for k, v in row.items() if k in _PUBLIC} for row in history]
        self.state.best_metric = None
        try:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]  # of the Trainer
        finally:
            self.state.log_history, self.state.best_metric = history, metrics
        report = self.privacy_report()
        if self.is_world_process_zero():  # type: ignore[attr-defined]  # of the Trainer
            card = Path(self.args.output_dir) / "README.md"
            text = card.read_text(encoding="utf-8") if card.exists() else ""
            card.write_text(f"{text.rstrip()}\n\n{privacy_statement_markdown(report)}\n", encoding="utf-8")
