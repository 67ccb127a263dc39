"""Imports point down: cli > commands > config > training, evaluation > models, priors, data > ... > types."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "idnerf"

# Lowest first. A module may import from lower levels and from its own part, never from a sibling part of its level.
LEVELS = [
    {"errors", "processors"},
    {"types", "hub", "files"},
    {"geometry", "checkpoint", "allocator", "ranks", "compiled"},
    {"rendering"},
    {"models", "priors", "data"},
    {"arrays", "evaluation", "video"},
    {"training"},
    {"config", "viewer", "export", "poses"},
    {"commands"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}

# Heavy or optional libraries, and the one file that may import each.
ADAPTERS = {
    "lightning_fabric": "training/trainer.py",
    "av": "video.py",
    "pycolmap": "poses/structure_from_motion.py",
    "lpips": "evaluation/lpips.py",
    "diffusers": "priors/diffusers_networks.py",
    "transformers": "priors/clip.py",
    "skimage": "export/marching_cubes.py",
    "huggingface_hub": "hub.py",
    "torchvision": "evaluation/lpips.py",
    "viser": "viewer/server.py",
    "numba": "compiled/kernels.py",
    "llvmlite": "compiled/kernels.py",
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imported(path):
        words = name.split(".")
        if words[0] != "idnerf" or len(words) < 2 or words[1] == "__version__":
            continue
        assert words[1] in RANK, f"{path.name} imports {name}, which is on no level"
        lower = RANK[words[1]] < RANK[part]
        assert lower or words[1] == part, f"{path.relative_to(PACKAGE)} ({part}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_adapters(path):
    own = str(path.relative_to(PACKAGE))
    for name in imported(path):
        if (library := name.split(".")[0]) in ADAPTERS:
            assert own == ADAPTERS[library], f"{own} imports {library}; only {ADAPTERS[library]} may"


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "diffusers", "transformers", "viser", "pycolmap", "lightning_fabric", "av"]
    code = f"import sys, idnerf; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_and_version_load_nothing_heavy():
    heavy = ["torch", "numpy", "tyro", "diffusers", "transformers", "viser", "av", "rich"]
    for argument in ("--help", "--version"):
        code = (
            f"import sys; from idnerf import cli; sys.argv = ['idnerf', '{argument}']\n"
            f"try: cli.entry_point()\nexcept SystemExit: pass\n"
            f"print([m for m in {heavy} if m in sys.modules])"
        )
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert process.stdout.strip().splitlines()[-1] == "[]"


def test_the_commands_load_no_prior_and_no_viewer():
    heavy = ["diffusers", "transformers", "accelerate", "viser", "pycolmap", "skimage", "matplotlib", "tensorboard"]
    heavy += ["numba"]
    modules = ["commands.render", "commands.evaluate", "commands.demo", "models.idnerf", "arrays", "config"]
    imports = "; ".join(f"import idnerf.{module}" for module in modules)
    code = f"import sys; {imports}; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
