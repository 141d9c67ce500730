"""Saves and loads a training in one engine, by two processes and by one, and compares all that it kept.

    python -m tests.engines.checkpoints_worker FOLDER ENGINE ...

Imports once and forks the ranks of each life, in the environment that ``accelerate launch`` would give them, because a
launch costs more than all that is done here. Writes ``FOLDER/ENGINE/*.json``, and what ranks print into ``*.log``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands import launch as cli
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import Tensor

import dpft
from tests import zoo
from tests.engines.launching import ROOT, command, environment
from tests.engines.on_cpu import make_accelerator

EXAMPLES, STEPS = 7, 3
# name, processes, and whose checkpoint is loaded
LIVES: tuple[tuple[str, int, str | None], ...] = (
    ("new", 2, None),
    ("same", 2, "new"),
    ("fewer", 1, "new"),
    ("more", 2, "fewer"),
)
RATE = 1e-2
SECONDS = 100


def lives_of(engine: str) -> tuple[tuple[str, int, str | None], ...]:
    """From one process to two in the stages of ZeRO that differ: a conversion takes seconds.

    An example that is spread over two ranks stays so.
    """
    if engine.startswith("sp2"):
        return LIVES[:2]
    return LIVES[:3] if engine in ("zero1", "zero2") else LIVES


class Examples:
    """The zoo's token batch, one dictionary each."""

    def __init__(self) -> None:
        self.batch = zoo.token_batch(EXAMPLES, 9, seed=3)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.batch.items()}


def kept(accelerator: Any, model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights and moments, whole, by name: on rank 0. A collective."""
    found = {f"weight {name}": value.clone() for name, value in (accelerator.get_state_dict(model) or {}).items()}
    parts = getattr(optimizer.sums, "layout", None) if hasattr(optimizer, "sums") else None
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        if parts is None:
            for name, p in accelerator.unwrap_model(model).named_parameters():
                value = optimizer.state[p][moment]
                found[f"{moment} {name}"] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            continue
        states = [optimizer.inner.state[flat][moment] for flat in parts.flats]
        for name, fragments in parts.fragments.items():
            if moment == "step":
                found[f"{moment} {name}"] = torch.as_tensor(float(states[0]))
                continue
            whole = torch.zeros(sum(f.numel for f in fragments))
            for f in fragments:
                if f.rank == accelerator.process_index:
                    whole[f.start : f.start + f.numel] = states[f.flat][f.offset : f.offset + f.numel]
            if accelerator.num_processes > 1:
                dist.all_reduce(whole)
            found[f"{moment} {name}"] = whole
    return found


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any element; infinite where names or shapes are others."""
    if one.keys() != other.keys():
        return float("inf")
    pairs = [(one[name].reshape(-1), other[name].reshape(-1)) for name in one]
    return max(float((a - b).abs().max()) if len(a) == len(b) else float("inf") for a, b in pairs)


def live(folder: Path, life: str, before: str | None) -> dict[str, Any]:
    """One life of a run: train, or load what another life saved, compare, and make one more step; on every rank."""
    from finetune import checkpoints

    accelerator = make_accelerator()
    source = None if before is None else checkpoints.find(accelerator, folder / before)
    model = zoo.seeded(zoo.llama)("sdpa")
    inner = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, eps=1e-3)
    privacy = dpft.PrivacyConfig(
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=EXAMPLES,
        sample_rate=1.0,  # each step takes all: it does not matter which step of the ledger it is
        num_steps=50,
        target_delta=1e-5,
    )
    ranks = getattr(accelerator.parallelism_config, "sp_size", 1)
    rows = 3 if ranks == 1 else 1
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        inner,
        Examples(),
        privacy,
        max_physical_batch_size=rows,
        ledger_path=folder / "ledger.jsonl",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step <= STEPS))
    accelerator.register_for_checkpointing(schedule)
    facts: dict[str, Any] = {"processes": accelerator.num_processes, "ledger before": loader.privacy.steps}
    facts["ranks of an example"] = ranks
    steps = iter(loader)

    def step() -> None:
        for batch in steps:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            ends = loader.is_last
            optimizer.zero_grad()
            if ends:
                schedule.step()
                return

    if source is not None:
        checkpoints.load(accelerator, source)
        facts["removed"] = not source.converted or not source.path.exists() or not accelerator.is_main_process
        found = kept(accelerator, model, optimizer)
        facts["ledger after"] = loader.privacy.steps
        if accelerator.is_main_process:
            facts["loaded"] = differ(found, torch.load(folder / "saved.pt"))
            facts["moments"] = sum(bool(value.any()) for name, value in found.items() if name.startswith("exp_avg"))
        steps = iter(loader)
    else:
        for _ in range(STEPS):
            step()
        found = kept(accelerator, model, optimizer)
        if accelerator.is_main_process:
            torch.save(found, folder / "saved.pt")
    checkpoints.save(accelerator, folder / life, STEPS)
    step()
    found = kept(accelerator, model, optimizer)
    if accelerator.is_main_process and source is None:
        torch.save(found, folder / "next.pt")
    elif accelerator.is_main_process:
        facts["next"] = differ(found, torch.load(folder / "next.pt"))
        facts["moved"] = differ(found, torch.load(folder / "saved.pt"))
    step()  # at a learning rate of zero
    after = kept(accelerator, model, optimizer)
    if accelerator.is_main_process:
        still = {name: value for name, value in after.items() if name.startswith("weight")}
        facts["moved at rate zero"] = differ(still, {name: found[name] for name in still})
    facts["ledger at the end"] = loader.privacy.steps
    facts["rates"] = [group["lr"] for group in optimizer.param_groups]
    return facts


def launch_environment(engine: str, processes: int, scratch: Path) -> dict[str, str]:
    """What ``accelerate launch`` would put into the environment of a rank, besides the rank."""
    args = cli.launch_command_parser().parse_args(command(engine, "worker.py", processes=processes)[2:])
    args, defaults, _ = cli._validate_launch_command(args)
    if not args.use_deepspeed:
        return environment(scratch) | prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return environment(scratch) | prepare_deepspeed_cmd_env(args)[1]


def free_port() -> int:
    """Below those that systems give to who asks for any: nobody else gets it before rank 0 has opened it."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
            return port
    raise RuntimeError("no port is free")


def fork_ranks(folder: Path, engine: str, life: str, processes: int, before: str | None) -> bool:
    """Live one life; whether all ranks came to its end."""
    shared = launch_environment(engine, processes, folder)
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                log = os.open(folder / f"{life}-{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                faulthandler.dump_traceback_later(SECONDS - 5)
                os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                facts = live(folder, life, before)
                (folder / f"{life}-{rank}.json").write_text(json.dumps(facts))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    until, ended = time.monotonic() + SECONDS, dict.fromkeys(children, -1)
    while -1 in ended.values() and max(ended.values()) <= 0 and time.monotonic() < until:
        time.sleep(0.02)
        for child in [child for child, code in ended.items() if code == -1]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ended[child] = abs(os.waitstatus_to_exitcode(status))
    for child in [child for child, code in ended.items() if code == -1]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return set(ended.values()) == {0}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "recipes"))
    import deepspeed  # noqa: F401  # imported once, for all ranks that are forked

    import finetune.checkpoints  # noqa: F401  # imported once, the same

    gc.freeze()  # what is imported stays: DeepSpeed collects garbage at every end of an engine
    for engine in sys.argv[2:]:
        folder = Path(sys.argv[1]) / engine
        folder.mkdir(parents=True)
        for life, processes, before in lives_of(engine):
            if not fork_ranks(folder, engine, life, processes, before):
                break
