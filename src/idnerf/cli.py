"""The command line: `idnerf COMMAND ...`. Each command is a function with typed arguments; tyro makes its flags.

Commands are imported when they are called, so that `idnerf --help` answers at once.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from idnerf import __version__
from idnerf.errors import InputError

COMMANDS = {
    "demo": "a first picture: render a bundled scene with the default weights (no download, CPU)",
    "render": "new views of a scene as pictures or video",
    "evaluate": "score held-out views of scenes, with published protocols",
    "train": "train a preset",
    "train-prior": "train the small diffusion prior (autoencoder and U-Net) that guides a training",
    "scenes": "write procedural scenes to disk",
    "export": "point clouds, meshes, depth maps and data sets of rendered views",
    "view": "a web viewer whose picture follows the browser's camera",
    "poses": "your own photos without poses to a posed scene",
    "finetune": "refine the weights on one scene's photos, kept only if held-out photos gain",
    "check": "what a folder of data holds, and what it lacks",
    "share": "weights with a model card, as a folder or on the Hugging Face hub",
    "convert": "published GMFlow and MatchNeRF checkpoints to our format, or the mean of several weights",
}

REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
}
"""What to do about errors of the operating system."""


def main(arguments: Sequence[str]) -> None:
    """Run one command. Raises InputError for bad input; SystemExit for --help and wrong flags."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(f"idnerf {__version__}")
        return
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}: expected one of {', '.join(COMMANDS)} (idnerf --help)")
    from idnerf.allocator import keep_freed_memory

    keep_freed_memory()
    name = command.replace("-", "_")
    module = importlib.import_module(f"idnerf.commands.{name}")
    if command == "train":
        module.train(rest)
        return
    from idnerf.commands.parsing import call_with

    call_with(getattr(module, name), rest, f"idnerf {command}")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: idnerf COMMAND [options]",
            "",
            "Two or three posed photos in; novel views, depth and video out.",
            "",
            "commands:",
            *lines,
            "",
            "`idnerf COMMAND --help` lists a command's options; `idnerf --version` prints the version.",
        ]
    )


def entry_point() -> None:
    """Console script: one clear line and exit code 2 on bad input, 130 on Ctrl-C."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"idnerf: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError:
        fail_for_memory()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        fail_for_memory()
    except KeyboardInterrupt:
        print("idnerf: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        print(f"idnerf: {os_trouble(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def os_trouble(error: OSError) -> str:
    """One line: which file or folder, what the operating system says, and what to do where that is known."""
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
    remedy = REMEDIES.get(error.errno or 0)
    return f"{place}{reason}" + (f"; {remedy}" if remedy else "")


def fail_for_memory() -> NoReturn:
    print("idnerf: not enough memory: give a smaller --size or fewer sources", file=sys.stderr)
    raise SystemExit(1) from None


if __name__ == "__main__":
    entry_point()
