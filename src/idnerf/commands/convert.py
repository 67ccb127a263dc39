"""`idnerf convert`: published GMFlow and MatchNeRF checkpoints to our format; the mean of several weights of ours."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from idnerf.checkpoint import write_tensors
from idnerf.commands.options import check_writable, choose_device
from idnerf.errors import InputError
from idnerf.models.published import convert_checkpoint
from idnerf.models.weight_mean import mean_of_weights


def convert(file: tyro.conf.Positional[Path], out: Path, mean_with: tuple[str, ...] = (), device: str = "auto") -> None:
    """Convert a published checkpoint (GMFlow's or MatchNeRF's .pth) to safetensors. Nothing in it is executed.

    With --mean-with it writes the mean of weights of ours instead.

    Args:
        file: such as gmflow_sintel-0c07dcb3.pth or matchnerf_3v.pth; with --mean-with weights of ours.
        out: the .safetensors file to write: weights for --weights (MatchNeRF), or an encoder to start a training
            from with --encoder-init (GMFlow).
        mean_with: write the mean of FILE and these instead: `default`, files, run folders or hub ids of weights of one
            configuration, such as several trainings from the same start.
        device: auto, cpu or cuda, as for every command; converting needs the CPU alone.
    """
    choose_device(device)
    if out.suffix != ".safetensors":
        raise InputError(f"expected --out ending in .safetensors, got {out.name!r}")
    if mean_with:
        write_mean([str(file), *mean_with], out)
        return
    if file.suffix == ".safetensors":
        raise InputError(
            f"expected a published PyTorch checkpoint (.pth, .ckpt), got {file.name}, which is safetensors already: "
            "--weights takes it if idnerf wrote it"
        )
    check_writable(out)
    kind, config, tensors = convert_checkpoint(file)
    if kind == "matchnerf":
        metadata = {"config": {"configuration": "paper", "paper": config}, "source": file.name}
        write_tensors(out, {f"core.{name}": value for name, value in tensors.items()}, metadata)
    else:
        write_tensors(out, tensors, {"encoder": kind, "source": file.name})
    print(f"{out}: {kind}, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M numbers")


def write_mean(weights: Sequence[str], out: Path) -> None:
    """Write the mean of several weights, and say of how many."""
    check_writable(out)
    model = mean_of_weights(weights)
    model.save(out)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: the mean of {len(weights)} weights, {numbers / 1e6:.2f} M numbers")
