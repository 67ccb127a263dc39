"""`idnerf check`: says what a folder holds; for DTU, what the published training and evaluation would lack."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idnerf import cli
from idnerf.errors import InputError
from idnerf.evaluation.protocols import load_table
from idnerf.training.dtu_layout import inspect_dtu
from scene_writers import make_scene, write_llff

TABLE = load_table("dtu")
VIEWS = sorted({*TABLE["any_scene"]["sources"], *TABLE["any_scene"]["targets"]})
CAMERA = """extrinsic
1 0 0 0
0 1 0 0
0 0 1 0
0 0 0 1

intrinsic
360 0 80
0 360 64
0 0 1

425.0 2.5
"""


def picture(size: tuple[int, int] = (640, 512)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "grey").save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def root(tmp_path) -> Path:
    """One training scan under two lights, one test scan with depth, the views of the protocol."""
    root = tmp_path / "DTU"
    (root / "Cameras" / "train").mkdir(parents=True)
    lines = [str(len(VIEWS))]
    for view in VIEWS:
        (root / "Cameras" / "train" / f"{view:08d}_cam.txt").write_text(CAMERA)
        partners = [other for other in VIEWS if other != view][:5]
        lines += [str(view), f"{len(partners)} " + " ".join(f"{other} 1.0" for other in partners)]
    (root / "Cameras" / "pair.txt").write_text("\n".join(lines) + "\n")
    pixels = picture()
    for scan, lights in (("scan3", (0, 3)), ("scan1", (3,))):
        folder = root / "Rectified" / f"{scan}_train"
        folder.mkdir(parents=True)
        for light in lights:
            for view in VIEWS:
                (folder / f"rect_{view + 1:03d}_{light}_r5000.png").write_bytes(pixels)
    (root / "Depths" / "scan1").mkdir(parents=True)
    (root / "Depths" / "scan1" / "depth_map_0023.pfm").write_bytes(b"Pf\n1 1\n-1\n" + np.float32(1).tobytes())
    return root


def test_a_sound_root_is_ready(root):
    layout = inspect_dtu(root)
    assert layout.training == ("scan3",) and layout.test == ("scan1",)
    assert len(layout.cameras) == layout.paired == len(VIEWS)
    assert layout.views == (len(VIEWS), len(VIEWS)) and layout.lights == {0, 3} and layout.with_depth == 1
    assert layout.training_problems == layout.test_problems == ()
    text = "\n".join(layout.lines())
    assert "1 of 88 scans; lights 0 3" in text and "1 of 16 scans" in text
    assert "training: ready" in text and "evaluation: ready" in text


BROKEN = {
    "no pair list": ("Cameras/pair.txt", "training", "no Cameras/pair.txt"),
    "no training scan": ("Rectified/scan3_train", "training", "no training scan"),
    "no test scan": ("Rectified/scan1_train", "evaluation", "no test scan"),
    "no depth maps": ("Depths", "evaluation", "no depth maps"),
    "a view of the protocol": ("Rectified/scan1_train/rect_025_3_r5000.png", "evaluation", "scan1 lacks view 24"),
    "a camera": ("Cameras/train/00000024_cam.txt", "training", "has no 00000024_cam.txt"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_lacking_is_named(case, root):
    name, what, expected = BROKEN[case]
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = inspect_dtu(root).lines()
    assert any(line.startswith(f"{what}: ") and expected in line for line in lines), lines
    assert f"{what}: ready" not in lines


def test_damage_is_bad_input(root):
    first = root / "Rectified" / "scan1_train" / "rect_015_3_r5000.png"
    first.write_bytes(picture((1600, 1200)))
    with pytest.raises(InputError, match="1600x1200: expected 640x512"):
        inspect_dtu(root)
    first.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="is damaged"):
        inspect_dtu(root)
    (root / "Cameras" / "train" / "00000024_cam.txt").write_text("extrinsic\n1 2 3")
    with pytest.raises(InputError, match="malformed"):
        inspect_dtu(root)
    shutil.rmtree(root / "Cameras" / "train")
    with pytest.raises(InputError, match="no DTU root"):
        inspect_dtu(root)


def test_the_command_describes_scenes_and_roots(root, tmp_path, capsys):
    cli.main(["check", str(root)])
    assert "training: ready" in capsys.readouterr().out
    cli.main(["check", str(root), "--scan", "scan1"])
    assert f"scan1 (dtu): {len(VIEWS)} photos of 640x512, all readable" in capsys.readouterr().out
    scene = write_llff(tmp_path / "many" / "one", make_scene(views=3, size=(32, 24)))
    shutil.copytree(scene, tmp_path / "many" / "two")
    cli.main(["check", str(tmp_path / "many")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["one (llff)", "two (llff)"]
    assert "3 photos" in lines[0] and "no exact depth" in lines[0]
    damaged = next((tmp_path / "many" / "two").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(InputError, match=damaged.name):
        cli.main(["check", str(tmp_path / "many")])
