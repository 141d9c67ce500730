"""LoRA on a base that is quantised and frozen: the libraries are optional, and their kernels want float32."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tools.models.adapters import BASES, Adapter, with_adapter
from tools.models.building import ROWS, NotBuiltError, build_batch, build_config, randomise
from tools.models.precision import SINGLE

QUANTISATIONS = ("nf4", "fp4", "int8", "int8, with outliers", "torchao int8", "torchao fp8")
OUTLIERS = 6.0  # transformers' default threshold
_LORA = Adapter("LoRA", "LoraConfig", {"r": 16, "target_modules": "all-linear", "init_lora_weights": False})


def quantisation(name: str) -> Any:
    """A quantisation config of transformers.

    Raises:
        NotBuiltError: its library is not installed.
    """
    if name.startswith("torchao"):
        torchao = _installed("torchao.quantization")
        configs = {"torchao int8": "Int8WeightOnlyConfig", "torchao fp8": "Float8WeightOnlyConfig"}
        return transformers.TorchAoConfig(getattr(torchao, configs[name])())
    _installed("bitsandbytes")
    if name.startswith("int8"):
        threshold = OUTLIERS if "outliers" in name else 0.0
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotBuiltError(f"{module.partition('.')[0]} is not installed") from None


@dataclass(frozen=True)
class QuantisedBase:
    """A quantised Llama with LoRA in all linear layers.

    Attributes:
        quantisation: of :data:`QUANTISATIONS`.
    """

    quantisation: str

    head = "quantised"
    precision = SINGLE
    name = property(lambda self: f"LoRA on {self.quantisation}")
    class_name = property(lambda self: _LORA.config)

    def __str__(self) -> str:
        return str(self.name)

    def build(self) -> nn.Module:
        """As a user has it: saved, loaded quantised, prepared by PEFT; float32.

        Raises:
            NotBuiltError: a library is not installed, or does not quantise on this machine.
        """
        quantised = quantisation(self.quantisation)
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = build_config(BASES["llama"])
            config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 128  # 4-bit blocks have 64 weights
            base = transformers.LlamaForCausalLM(config)
            randomise(base)
            base.save_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantised, dtype=torch.float32, device_map="cpu"
            )
            try:
                import peft
            except ImportError:
                raise NotBuiltError("peft is not installed") from None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            return with_adapter(model, _LORA).train()

    def lengths(self) -> list[int]:
        """Tokens of the rows."""
        return list(ROWS)

    def make_batch(self, config: Any, lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
        """As :func:`~tools.models.building.build_batch`."""
        return build_batch(BASES["llama"], config, lengths, seed)
