"""`idnerf train PRESET`: every field of the preset is a flag; `--resume RUN` finds those of the run again."""

import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from idnerf.checkpoint import read_metadata
from idnerf.commands.options import check_writable, choose_device
from idnerf.commands.parsing import parse
from idnerf.config import PRESETS, run_training
from idnerf.errors import InputError
from idnerf.models.idnerf import config_from_json, read_model_config
from idnerf.ranks import is_first_process
from idnerf.training.trainer import TrainerConfig

PER_START = ("resume", "out", "device", "processes", "workers", "threads")
"""Options that belong to a start, not to the training: a resumed run does not take them from its first start."""
ADDED_PARTS = ("view_refinement",)
"""Parts of a preset's model that a training must not lack unnoticed."""


def train(arguments: Sequence[str]) -> None:
    """Parse ``PRESET --flags`` and train; prints the run folder."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {name}" for name in PRESETS)
        print(f"usage: idnerf train PRESET [options]\n\npresets:\n{names}\n")
        print("`idnerf train PRESET --help` lists a preset's options.")
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    config = parse(type(preset), [*recorded_flags(name, rest), *rest], f"idnerf train {name}", default=preset)
    from idnerf.training.trainer import TrainingDivergedError

    choose_device(config.trainer.device)
    check_model_options(config.trainer, rest)
    check_writable(config.trainer.resume or config.trainer.out, folder=True)
    try:
        run = run_training(config, {"preset": name, "flags": list(flags_of(config))})
    except TrainingDivergedError as error:
        print(f"idnerf: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if is_first_process(os.environ):
        print(f"{run}: weights.safetensors, training_state.safetensors, log.jsonl, tensorboard/")


def check_model_options(config: TrainerConfig, arguments: Sequence[str]) -> None:
    """Weights to start from bring their own model options: others are for ``--extend``.

    Raises:
        InputError: the weights are of the other configuration, or the training would not follow a model option among
            the arguments, or would have no view refinement or latent where its preset has.
    """
    if config.init is None or config.resume is not None:
        return
    name, theirs = config.model.configuration, read_model_config(config.init)
    if theirs.configuration != name:
        raise InputError(
            f"--init {config.init}: expected weights of the `{name}` configuration, got `{theirs.configuration}`; "
            "choose a preset of that configuration"
        )
    if config.extend:
        return
    wanted, kept = getattr(config.model, name), getattr(theirs, name)
    given = {argument.partition("=")[0].replace("_", "-").replace(".no-", ".") for argument in arguments}
    for field in dataclasses.fields(wanted):
        flag = f"--model.{name}.{field.name.replace('_', '-')}"
        value, held = getattr(wanted, field.name), getattr(kept, field.name)
        if value != held and (flag in given or (field.name in ADDED_PARTS and not held)):
            raise InputError(
                f"{flag}: {config.init} keeps its own, {held}, and you ask for {value}; add --extend, which takes the "
                "model options of the preset and the command line, or leave this one out"
            )


def recorded_flags(name: str, arguments: Sequence[str]) -> list[str]:
    """The flags that the run to be resumed was started with; none where no run is resumed, or it recorded none.

    Raises:
        InputError: the run is of another preset.
    """
    from idnerf.training.state import STATE_FILE

    run = value_of("--resume", arguments)
    path = Path(run or "") / STATE_FILE
    if run is None or not path.is_file():
        return []
    state = read_metadata(path, "training state")
    options = state.get("options") or {}
    if not options and is_first_process(os.environ):
        print(f"warning: {path} does not say how it was started: give the options of then", file=sys.stderr)
    if options and options["preset"] != name:
        raise InputError(f"{run} was started with the preset {options['preset']}, got {name}; give that one")
    flags: list[str] = options.get("flags", [])
    return [*flags, *flags_of_missing_options(state)] if flags else flags


def flags_of_missing_options(state: Mapping[str, Any]) -> Iterator[str]:
    """Model options that the run could not say, as they were none then: it has none of them, whatever its preset says
    today. A prior's run has no model."""
    model = state["train_config"].get("model")
    if model is None:
        return
    name = model["configuration"]
    known = model[name]
    config = getattr(config_from_json({"configuration": name, name: known}), name)
    missing = {field.name for field in dataclasses.fields(config)} - known.keys()
    yield from flags_of(config, f"model.{name}.", missing)


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What follows a flag (the last one, if it is given twice), as ``--flag VALUE`` or ``--flag=VALUE``."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag:
            found = following
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return None if found in (None, "None") else found


def flags_of(config: Any, prefix: str = "", only: Collection[str] | None = None) -> Iterator[str]:
    """The flags that make a preset's configuration, all but those of ``PER_START``; ``only`` of these fields."""
    for field in dataclasses.fields(config):
        if only is not None and field.name not in only:
            continue
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, "" if field.name == "trainer" else f"{prefix}{name}.")
        elif field.type in (bool, "bool"):
            yield f"--{prefix}{name}" if value else f"--{prefix}no-{name}"
        elif prefix or field.name not in PER_START:
            yield f"--{prefix}{name}"
            yield from map(word, value if isinstance(value, list | tuple) else [value])


def word(value: Any) -> str:
    """A value on the command line; paths so that they hold in any working directory."""
    is_place = isinstance(value, Path) or (isinstance(value, str) and os.sep in value and Path(value).exists())
    return str(Path(value).absolute()) if is_place else str(value)
