"""``dpft plan``: time and memory of a private step of a model that is never loaded."""

from __future__ import annotations

import argparse
from typing import Any

from dpft.command_line.mechanism import add_mechanism, mechanism_of
from dpft.planning.hardware import HARDWARE
from dpft.planning.plan import plan
from dpft.planning.simulate import ENGINES
from dpft.privacy.config import PrivacyConfig

GIB = 2**30


def add_to(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("plan", help="FLOPs, time and memory of a private step, by strategy")
    command.add_argument("model", help="folder or name on the hub of a causal LM; its configuration alone is read")
    command.add_argument("--batch-size", default="1", help="of a physical batch, or auto (default 1)", metavar="B")
    command.add_argument("--seq-len", type=int, default=1024, help="tokens (default 1024)", metavar="T")
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the parameters (default bf16)")
    command.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    command.add_argument("--long-context", action="store_true", help="with dpft.long_context")
    command.add_argument("--engine", choices=ENGINES, default="single", help="default single")
    command.add_argument("--world-size", type=int, default=1, help="processes of the engine", metavar="N")
    command.add_argument("--sequence-parallel", type=int, default=1, help="ranks of one text", metavar="S")
    command.add_argument("--hardware", choices=sorted(HARDWARE), default="h100", help="default h100")
    command.add_argument("--memory", type=float, help="of a device, in GiB; that of the hardware", metavar="GIB")
    command.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default adamw")
    add_mechanism(command, default=None)
    command.add_argument("--secure-noise", action="store_true", help="noise from a cryptographic generator")
    command.set_defaults(run=of_step)


def noise_of(args: argparse.Namespace) -> PrivacyConfig | None:
    """A training with the noise that was asked about; None if none was. The plan needs none of the other constants."""
    _, constants = mechanism_of(args)
    if args.mechanism is None and args.bands is None and args.buffers is None and not args.secure_noise:
        return None
    return PrivacyConfig(
        noise_multiplier=1.0,
        target_delta=1e-6,
        expected_batch_size=1,
        num_steps=1,
        secure_rng=args.secure_noise,
        **constants,
    )


def of_step(args: argparse.Namespace) -> str:
    """The plan of a step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if args.batch_size != "auto" and not args.batch_size.isdigit():
        raise ValueError(f"--batch-size is {args.batch_size!r}; expected a whole number or auto")
    privacy = noise_of(args)
    try:
        config = AutoConfig.from_pretrained(args.model)
    except OSError as error:
        raise ValueError(
            f"{args.model!r} is no folder with a config.json, and not found on the hub; expected a causal LM. "
            f"transformers says: {error}"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return str(
        plan(
            model,
            "auto" if args.batch_size == "auto" else int(args.batch_size),
            args.seq_len,
            args.dtype,
            args.checkpointing,
            None if args.memory is None else int(args.memory * GIB),
            args.engine,
            args.world_size,
            args.hardware,
            args.optimizer,
            long_context=args.long_context,
            sequence_parallel=args.sequence_parallel,
            privacy=privacy,
        )
    )
