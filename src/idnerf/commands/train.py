"""`idnerf train PRESET`: every field of the preset is a flag."""

import os
import sys
from collections.abc import Sequence

from idnerf.commands.options import check_writable, choose_device
from idnerf.commands.parsing import parse
from idnerf.config import PRESETS, run_training
from idnerf.errors import InputError


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
    config = parse(type(preset), rest, f"idnerf train {name}", default=preset)
    from idnerf.training.trainer import TrainingDivergedError

    choose_device(config.trainer.device)
    check_writable(config.trainer.resume or config.trainer.out, folder=True)
    try:
        run = run_training(config)
    except TrainingDivergedError as error:
        print(f"idnerf: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if os.environ.get("RANK", "0") == "0":
        print(f"{run}: weights.safetensors, training_state.safetensors, log.jsonl, tensorboard/")
