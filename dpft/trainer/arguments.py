"""What each field of ``transformers.TrainingArguments`` means in a private training.

Each field is in :data:`WORKS` (it means what it says), or has a rule in :data:`RULES` that sets it, with a line that
says so, or refuses it. A test fails for a field of the class that is in neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dpft.errors import PrivacyConfigError
from dpft.privacy import PrivacyConfig

logger = logging.getLogger(__name__)

Rule = Callable[[Any, PrivacyConfig], "str | None"]
"""Takes the arguments and the privacy; changes a field and returns the line that says so, or None; or raises."""

_WORKS = """
    output_dir per_device_train_batch_size learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules bf16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    use_cache torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter log_level log_level_replica disable_tqdm run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config parallelism_config dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns label_names length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank torch_compile_backend
    torch_compile_mode liger_kernel_config label_smoothing_factor
"""
WORKS = frozenset(_WORKS.split())

_LOCAL_TRACKERS = ("none", "tensorboard")
# Optimisers that step in the backward, parameter by parameter, before there is a clipped sum; or that must be told of
# train and eval mode, which a DPOptimizer does not pass on.
_STEPS_IN_BACKWARD = ("lomo", "adalomo")
_REFUSED_OPTIMISERS = {
    **dict.fromkeys(_STEPS_IN_BACKWARD, "it steps within the backward, before gradients are summed and noised"),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "it has to be switched between training and evaluation, which is not supported",
    ),
}


def _refuse(name: str, usual: Any, instead: str) -> Rule:
    """A rule that accepts only ``usual`` (or nothing), and otherwise says what to use instead."""

    def rule(args: Any, privacy: PrivacyConfig) -> str | None:
        value = getattr(args, name)
        if value == usual or (not value and not usual):
            return None
        raise PrivacyConfigError(
            f"{name}={value!r} is not possible in a private training; expected {usual!r}. {instead}"
        )

    return rule


def _optim(args: Any, privacy: PrivacyConfig) -> str | None:
    name = str(getattr(args.optim, "value", args.optim))
    reason = _REFUSED_OPTIMISERS.get(name)
    if name.endswith("_layerwise"):
        reason = _REFUSED_OPTIMISERS["lomo"]
    if reason is not None:
        raise PrivacyConfigError(f"optim={name!r}: {reason}. Use 'adamw_torch', or another that steps on .grad.")
    return None


def _steps(args: Any, privacy: PrivacyConfig) -> str | None:
    """``max_steps`` of the privacy, which was calibrated for it; a different number in both is a contradiction."""
    if args.max_steps > 0:
        if privacy.num_steps is not None and args.max_steps != privacy.num_steps:
            raise PrivacyConfigError(
                f"max_steps={args.max_steps} and PrivacyConfig.num_steps={privacy.num_steps}: one step is one logical "
                "batch, and the noise is calibrated for their number. Give both the same, or leave max_steps out."
            )
        if privacy.num_epochs is not None:
            raise PrivacyConfigError(
                f"max_steps={args.max_steps} and PrivacyConfig.num_epochs={privacy.num_epochs:g}: the noise is "
                "calibrated for one of them. Leave max_steps out, or give PrivacyConfig num_steps instead."
            )
    return None


def _clip_norm(args: Any, privacy: PrivacyConfig) -> str | None:
    if args.max_grad_norm in (privacy.max_grad_norm, 0.0, 1.0, None):
        return None
    raise PrivacyConfigError(
        f"max_grad_norm={args.max_grad_norm!r}: Trainer would clip the noisy sum by it, which only weakens the "
        f"signal. The clip norm of examples is PrivacyConfig.max_grad_norm, {privacy.max_grad_norm:g} here; leave the "
        "argument out."
    )


def _no_skipping(args: Any, privacy: PrivacyConfig) -> str | None:
    if args.ignore_data_skip:
        return None
    args.ignore_data_skip = True
    return "ignore_data_skip set to True: a resume draws new batches, since each release draws its own"


def _no_token_average(args: Any, privacy: PrivacyConfig) -> str | None:
    if not args.average_tokens_across_devices:
        return None
    args.average_tokens_across_devices = False
    return (
        "average_tokens_across_devices set to False: the loss of an example is a mean over its own tokens; dividing "
        "by the batch's would make its gradient depend on the others"
    )


def _sampling_strategy(args: Any, privacy: PrivacyConfig) -> str | None:
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy == "group_by_length":
        return "train_sampling_strategy='group_by_length': drawn at random, sorted by length within a logical batch"
    if strategy != "random":
        raise PrivacyConfigError(
            f"train_sampling_strategy={strategy!r} is not possible in a private training; expected 'random', or "
            "'group_by_length'. Batches are drawn by PrivacyConfig.sampler, which the accountant relies on."
        )
    return None


def _hub(args: Any, privacy: PrivacyConfig) -> str | None:
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        raise PrivacyConfigError(
            f"hub_strategy={strategy!r} would publish checkpoints with trainer_state.json, whose losses were computed "
            "from private records without noise. Use 'end' or 'every_save'."
        )
    if args.push_to_hub and "tensorboard" in (args.report_to or []):
        raise PrivacyConfigError(
            "push_to_hub with report_to='tensorboard' would publish its logs from output_dir, whose losses were "
            "computed from private records without noise. Leave one of them out."
        )
    return None


def _trackers(args: Any, privacy: PrivacyConfig) -> str | None:
    elsewhere = [name for name in args.report_to or [] if name not in _LOCAL_TRACKERS]
    if elsewhere:
        logger.warning(
            "report_to=%s sends training losses and metrics, computed from private records without noise, to another "
            "machine: no epsilon covers them, and whoever reads them there must be allowed to read the records",
            elsewhere,
        )
    return None


RULES: dict[str, Rule] = {
    "max_steps": _steps,
    "num_train_epochs": lambda args, privacy: None,  # set with max_steps: see set_steps
    "max_grad_norm": _clip_norm,
    "optim": _optim,
    "gradient_accumulation_steps": _refuse(
        "gradient_accumulation_steps",
        1,
        "The logical batch is PrivacyConfig.expected_batch_size; per_device_train_batch_size is the physical one, and "
        "dpft accumulates by itself.",
    ),
    "ignore_data_skip": _no_skipping,
    "average_tokens_across_devices": _no_token_average,
    "fp16": _refuse("fp16", False, "Its loss scaling skips steps depending on the data. Use bf16=True."),
    "torch_compile": _refuse("torch_compile", False, "No rule would see a gradient. Leave it out."),
    "use_liger_kernel": _refuse(
        "use_liger_kernel", False, "Its layers have no gradient rule. Leave it out: dpft computes the head in chunks."
    ),
    "neftune_noise_alpha": _refuse(
        "neftune_noise_alpha",
        None,
        "Its noise depends on the length of the longest example beside one: examples would not be isolated.",
    ),
    "auto_find_batch_size": _refuse(
        "auto_find_batch_size", False, "dpft.plan predicts what fits; set per_device_train_batch_size from it."
    ),
    "include_num_input_tokens_seen": _refuse(
        "include_num_input_tokens_seen", "no", "The number of drawn tokens is private, and would be in the logs."
    ),
    "dataloader_drop_last": _refuse(
        "dataloader_drop_last", False, "A Poisson sample has no last batch, and every drawn example must count."
    ),
    "train_sampling_strategy": _sampling_strategy,
    "debug": _refuse("debug", "", "It prints activations of private records."),
    "hub_strategy": _hub,
    "report_to": _trackers,
}


def apply_rules(args: Any, privacy: PrivacyConfig) -> None:
    """Check and set every field.

    Raises:
        PrivacyConfigError: a field is refused; says what to use instead.
    """
    if getattr(args, "n_gpu", 1) > 1:
        raise PrivacyConfigError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; launch one process for each with "
            "accelerate launch or torchrun."
        )
    for rule in RULES.values():
        line = rule(args, privacy)
        if line is not None:
            logger.info(line)
    for name in ("packing", "padding_free"):  # TRL's
        if getattr(args, name, False):
            raise PrivacyConfigError(
                f"{name}=True puts several examples into one row, and no gradient of a row is one example's. Leave it "
                "out: physical batches are cheap."
            )


def set_steps(args: Any, steps: int) -> None:
    """Let Trainer's own counting end with the schedule."""
    if args.max_steps != steps:
        logger.warning("max_steps set to %d, the number of logical batches that the noise is calibrated for", steps)
        args.max_steps = steps
