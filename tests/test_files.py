"""Files are written beside their place and renamed: links stay links, and nothing but a regular file is replaced."""

import os
import stat
from pathlib import Path

import pytest
import torch

from idnerf.checkpoint import write_tensors
from idnerf.errors import InputError
from idnerf.evaluation.report import write_report
from idnerf.export.atomic import whole_file
from idnerf.video import write_video


def write_text(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("text")


def write_frame(path: Path) -> None:
    write_video(path, [torch.zeros(3, 16, 16)], 1.0)


WRITERS = {
    "file.ply": write_text,
    "weights.safetensors": lambda path: write_tensors(path, {"x": torch.zeros(2)}, {}),
    "report.json": lambda path: write_report(path, {"mean": {}}),
    "video.gif": write_frame,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_what_it_leads_to_is_written(name, there, tmp_path):
    target, link = tmp_path / "elsewhere" / name, tmp_path / name
    if there:
        target.parent.mkdir()
        target.write_text("old")
    link.symlink_to(target)
    WRITERS[name](link)
    assert link.is_symlink() and not target.is_symlink() and target.read_bytes() not in (b"", b"old")
    assert [p.name for p in target.parent.iterdir()] == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["elsewhere", name])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("linked", [True, False])
def test_what_is_no_regular_file_is_refused_and_stays(name, linked, tmp_path):
    pipe = tmp_path / "pipe" / name
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    path = tmp_path / name
    if linked:
        path.symlink_to(pipe)
    else:
        path = pipe
    with pytest.raises(InputError, match="expected a regular file") as error:
        WRITERS[name](path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and [p.name for p in pipe.parent.iterdir()] == [name]


def test_a_link_to_itself_is_named(tmp_path):
    link = tmp_path / "a.ply"
    link.symlink_to(link)
    with pytest.raises(InputError, match="leads round in a circle"):
        write_text(link)
