"""`idnerf convert`: published GMFlow and MatchNeRF checkpoints to our format."""

from pathlib import Path

import tyro

from idnerf.checkpoint import write_tensors
from idnerf.commands.options import check_writable, choose_device
from idnerf.errors import InputError
from idnerf.models.published import convert_checkpoint


def convert(file: tyro.conf.Positional[Path], out: Path, device: str = "auto") -> None:
    """Convert a published checkpoint (GMFlow's or MatchNeRF's .pth) to safetensors. Nothing in it is executed.

    Args:
        file: such as gmflow_sintel-0c07dcb3.pth or matchnerf_3v.pth.
        out: the .safetensors file to write: weights for --weights (MatchNeRF), or an encoder to start a training
            from with --encoder-init (GMFlow).
        device: auto, cpu or cuda, as for every command; converting needs the CPU alone.
    """
    choose_device(device)
    if out.suffix != ".safetensors":
        raise InputError(f"expected --out ending in .safetensors, got {out.name!r}")
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
