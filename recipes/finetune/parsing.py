"""From the command line, in groups, and a YAML file with the same keys to :class:`finetune.options.Options`.

A hyphen and an underscore mean the same. The command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from finetune.options import GROUPS, Options


def _value_type(annotation: Any) -> type:
    """``int`` for ``int``, ``str`` for ``str | None``."""
    options = [t for t in typing.get_args(annotation) if t is not types.NoneType]
    return options[0] if options else annotation


def _types(options: type[Options]) -> dict[str, type]:
    hints = typing.get_type_hints(options)
    return {f.name: _value_type(hints[f.name]) for f in fields(options)}


def _used(options: type[Options]) -> list[Any]:
    return [f for f in fields(options) if f.name not in options.unused]


def _flags(name: str) -> list[str]:
    """``--seq-len`` and ``--seq_len``."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows only the first spelling of an option, and of a switch how to turn it off."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        words = [action.option_strings[0], *[flag for flag in action.option_strings if flag.startswith("--no-")][:1]]
        if action.nargs != 0:
            words[0] += f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(words)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which for these options says nothing."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser(
    description: str, options: type[Options] = Options, program: str | None = None
) -> argparse.ArgumentParser:
    """The command line of a recipe's options, in groups; an option that was not given is absent from the result."""
    parser = _Parser(
        prog=program,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below; the command line wins"
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    kinds = _types(options)
    for f in _used(options):
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        flags = [flag for name in (f.name, *meta["also"]) for flag in _flags(name)]
        text = meta["help"]
        if meta["also"]:
            text += f" [also --{meta['also'][0]}]"
        if kinds[f.name] is bool:
            group.add_argument(*flags, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            shown = Path(str(f.default)).name if f.name == "model" else f.default
            if shown is not None:
                text += f" (default {shown:g})" if isinstance(shown, float) else f" (default {shown})"
            arguments = {"metavar": f.name.split("_")[-1].upper()} | meta["argparse"]
            if "choices" in arguments:
                del arguments["metavar"]
            group.add_argument(*flags, dest=f.name, type=kinds[f.name], help=text, **arguments)
    return parser


def read_yaml(path: str, options: type[Options] = Options) -> dict[str, Any]:
    """Read options from a YAML file: a flat mapping with the names of the options, hyphens or underscores.

    Raises:
        ValueError: the file is not a mapping, names an option that does not exist (the closest one is suggested),
            or holds a value of another type than the option has.
    """
    with open(path, encoding="utf-8") as file:
        try:
            loaded = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: got {type(loaded).__name__} at the top, expected a mapping such as 'seq_len: 1024'."
        )
    names = {alias: f.name for f in _used(options) for alias in (f.name, *f.metadata["also"])}
    kinds = _types(options)
    choices = {f.name: f.metadata["argparse"].get("choices") for f in fields(options)}
    optional = {f.name for f in fields(options) if f.default is None} | {"target_epsilon"}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        spelled = str(key).replace("-", "_")
        if spelled not in names:
            close = difflib.get_close_matches(spelled, names, n=1, cutoff=0.0)
            raise ValueError(
                f"{path}: unknown option {key!r}; the closest is {close[0]!r}. See --help for all of them."
            )
        name = names[spelled]
        if name in values:
            raise ValueError(f"{path}: {key!r} sets {name!r} a second time. Keep one of the two.")
        values[name] = _checked(path, str(key), value, kinds[name], name in optional, choices[name])
    return values


def _checked(path: str, key: str, value: Any, kind: type, optional: bool, choices: Sequence[str] | None) -> Any:
    """The value as the option's type; YAML reads 1e-6 as text, which is what a person meant as a number."""
    if value is None and optional:
        return None
    if kind in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below, with the option's name
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if type(value) is not kind:
        raise ValueError(f"{path}: {key!r} is {value!r} ({type(value).__name__}), expected {kind.__name__}.")
    if choices and value not in choices:
        raise ValueError(f"{path}: {key!r} is {value!r}, expected one of {', '.join(choices)}.")
    return value


def parse(
    argv: Sequence[str] | None = None,
    description: str = "",
    options: type[Options] = Options,
    program: str | None = None,
) -> Options:
    """Read the command line, and the YAML file that it may name.

    Args:
        argv: words of the command line; those of the process if None.
        description: text at the top of ``--help``.
        options: of the recipe.
        program: its name in messages; the file that was started if None.

    Returns:
        The options. A ``noise_multiplier`` given without a ``target_epsilon`` takes the default target's place.

    Raises:
        SystemExit: with a message on standard error, for an option that is unknown or has no sense.
    """
    parser = build_parser(description, options, program)
    given = vars(parser.parse_args(argv))
    try:
        config = given.pop("config", None)
        from_file = read_yaml(config, options) if config else {}
        # an alternative given on the command line takes the place of the one in the file
        for one, other in (("noise_multiplier", "target_epsilon"), ("num_steps", "num_epochs")):
            for this, that in ((one, other), (other, one)):
                if this in given and that not in given:
                    from_file.pop(that, None)
        values = from_file | given
        if values.get("clipping") == "none" and values.get("target_epsilon") is None:
            values.setdefault("noise_multiplier", 0.0)  # without clipping no noise is enough for any epsilon
        if values.get("noise_multiplier") is not None:
            values.setdefault("target_epsilon", None)
        return options(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def as_words(options: Options) -> dict[str, Any]:
    """The options that differ from the defaults, for the model card."""
    defaults = {f.name: f.default for f in fields(options)}
    defaults["num_steps"] = options.steps if options.num_epochs is None else None
    return {name: value for name, value in dataclasses.asdict(options).items() if value != defaults[name]}
