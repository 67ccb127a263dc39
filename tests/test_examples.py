"""Every numbered example runs, small, and leaves what it says; the notebook runs from top to bottom."""

import ast
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import av
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from plyfile import PlyData

from idnerf.models.idnerf import IDNeRF

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"

SMALL = {
    "01_render_new_view": {"width": 96},
    "02_arrays_in": {"width": 96},
    "03_evaluate": {"width": 96, "targets": 1},
    "04_video": {"width": 96, "frames": 2},
    "05_depth_and_confidence": {"width": 96},
    "06_point_cloud": {"width": 96},
    "07_train_tiny": {"width": 64, "steps": 2, "scenes": 1},
    "08_your_own_data": {"width": 64, "steps": 2},
    "09_swap_a_part": {"width": 96},
}
"""Example: options that make it a matter of a second or two."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_examples_are_numbered_and_each_is_run_here():
    names = [path.stem for path in sorted(EXAMPLES.glob("*.py"))]
    assert names == list(SMALL)
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("name", SMALL)
def test_examples_say_what_they_show_and_take_out(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    documentation = ast.get_docstring(ast.parse(source)) or ""
    assert documentation.startswith(f"{int(name[:2])}. ")
    parameters = inspect.signature(load(name).main).parameters
    assert "out" in parameters and all(p.default is not p.empty for p in parameters.values())
    described = inspect.getdoc(load(name).main) or ""
    assert all(f"{parameter}: " in described for parameter in parameters)


def run(name: str, out: Path, capsys: pytest.CaptureFixture) -> str:
    load(name).main(out=out, **SMALL[name])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file", "pictures"),
    [
        ("01_render_new_view", "new_view.png", 2),
        ("02_arrays_in", "between.png", 1),
        ("05_depth_and_confidence", "depth_and_confidence.png", 4),
        ("09_swap_a_part", "swapped.png", 3),
    ],
)
def test_examples_that_write_a_picture(name, file, pictures, tmp_path, capsys):
    printed = run(name, tmp_path, capsys)
    picture = np.asarray(Image.open(tmp_path / file))
    assert picture.shape == (72, 96 * pictures, 3)
    for part in np.split(picture, pictures, axis=1):
        assert part.std() > 5  # something is in every one of them
    assert file in printed


def test_the_evaluation_beats_the_copied_photo(tmp_path, capsys):
    run("03_evaluate", tmp_path, capsys)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["views"]) == 1
    assert report["mean"]["psnr"] > report["references"]["copy"]["mean"]["psnr"]


def test_the_video_has_its_frames(tmp_path, capsys):
    run("04_video", tmp_path, capsys)
    with av.open(str(tmp_path / "orbit.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(72, 192, 3)] * 2


def test_the_point_cloud_opens_elsewhere(tmp_path, capsys):
    printed = run("06_point_cloud", tmp_path, capsys)
    vertices = PlyData.read(str(tmp_path / "points.ply"))["vertex"]
    assert f"{vertices.count:,} points" in printed
    assert 1000 < vertices.count < 3 * 96 * 72
    assert vertices["red"].std() > 5


@pytest.mark.parametrize("name", ["07_train_tiny", "08_your_own_data"])
def test_the_trainings_leave_weights(name, tmp_path, capsys):
    run(name, tmp_path / "run", capsys)
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if entry["kind"] == "train"] == [1, 2]
    model = IDNeRF.from_pretrained(tmp_path / "run")
    assert model.config.configuration == "cascade"


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With smaller pictures: its first cell sets the width."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "WIDTH = 240" in first.source
    first.source = first.source.replace("WIDTH = 240", "WIDTH = 64")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) >= 4


def test_the_notebook_is_stored_small():
    assert NOTEBOOK.stat().st_size < 400_000
