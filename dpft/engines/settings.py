"""Arguments of :func:`dpft.prepare` that void the guarantee together, or that no engine can carry out."""

from __future__ import annotations

from typing import Any

from dpft.errors import EngineError, PrivacyConfigError
from dpft.privacy.config import PrivacyConfig


def check_batches(max_physical_batch_size: Any, clipping: str, strategy: str, seq_len: Any) -> None:
    """Refuse a size of physical batches that is none, or that cannot be planned.

    Raises:
        PrivacyConfigError: saying which.
    """
    if max_physical_batch_size != "auto":
        check_whole("max_physical_batch_size", max_physical_batch_size, 1)
    elif clipping != "flash" or strategy != "auto":
        raise PrivacyConfigError(
            f"max_physical_batch_size='auto' plans clipping='flash' with strategy='auto'; got {clipping!r} and "
            f"{strategy!r}. Give a number."
        )
    elif seq_len is None:
        raise PrivacyConfigError(
            "max_physical_batch_size='auto' needs seq_len, the tokens of the longest example: it decides what fits"
        )


def check_clipping(
    privacy: PrivacyConfig, kind: str, size: int, clipping: str, strategy: str, max_physical_batch_size: Any
) -> None:
    """Refuse a clipping that the noise, the engine or the ranks of one sequence do not go with.

    Args:
        privacy: the configuration.
        kind: of engine.
        size: ranks that share the tokens of an example.
        clipping: the mode.
        strategy: the strategy.
        max_physical_batch_size: a number, or ``auto``.

    Raises:
        PrivacyConfigError, EngineError: saying what to use instead.
    """
    if clipping == "none" and privacy.noise_multiplier != 0:
        raise PrivacyConfigError(
            "clipping='none' bounds nothing, so no noise makes it private; pass noise_multiplier=0 to say that "
            "this run is not private, or choose another clipping."
        )
    if size != 1 and (
        clipping != "flash" or strategy not in ("auto", "one_pass") or max_physical_batch_size not in (1, "auto")
    ):
        raise EngineError(
            f"sp_size is {size}, where a backward is one-pass, of one example; got clipping={clipping!r}, "
            f"strategy={strategy!r}, max_physical_batch_size={max_physical_batch_size!r}. Use 'flash', 'auto', 1."
        )
    if privacy.adaptive_clip is not None and (clipping == "none" or size != 1):
        raise PrivacyConfigError(
            f"adaptive_clip with clipping={clipping!r}, sp_size={size}: clipped examples are counted where each "
            "is clipped, on one rank. Use another clipping, without sp_size, or leave adaptive_clip out."
        )
    if privacy.clip_groups is not None and size != 1:
        raise EngineError(
            f"clip_groups with sp_size={size}: where the tokens of an example are spread over ranks, its gradient "
            "is clipped as a whole. Leave clip_groups out, or train without sp_size."
        )
    if clipping == "none" and kind != "single":
        raise EngineError("clipping='none' runs in one process; to compare on several, train without dpft.")


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises:
        PrivacyConfigError: saying what came.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PrivacyConfigError(f"{name} is {value!r}; expected a whole number >= {least}")
