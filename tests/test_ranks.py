"""Work shared among the processes of torchrun: the same results as one process, and each item made once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import two_ranks
from idnerf.cli import main
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.ranks import Ranks, interleaved, is_first_process, join_ranks, ranks_of
from tiny_cases import TINY_CASCADE

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(1, 4))
def test_items_dealt_out_come_back_in_order(count, world):
    items = list(range(count))
    assert interleaved([items[rank::world] for rank in range(world)]) == items


def test_torchrun_says_which_rank_this_is_and_without_it_there_is_one():
    assert ranks_of(TORCHRUN) == Ranks(1, 3)
    assert ranks_of({"RANK": "1", "WORLD_SIZE": "3"}) == ranks_of({}) == Ranks(0, 1)


def test_one_process_prints_whoever_started_them():
    torchrun = [{"RANK": str(i), "LOCAL_RANK": str(i % 2)} for i in range(4)]
    fabric = [{"LOCAL_RANK": str(i), "NODE_RANK": "0", "WORLD_SIZE": "2"} for i in range(2)]
    for environments in (torchrun, fabric, [{}]):
        assert list(map(is_first_process, environments)) == [True] + [False] * (len(environments) - 1)


def test_one_rank_makes_everything_itself():
    ranks = join_ranks("cpu")
    assert ranks.first and ranks.gather("item") == ["item"]
    assert list(ranks.made_in_order(3, lambda number: 10 * number)) == [0, 10, 20]
    with ranks.first_goes_ahead():
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc-per-node"):
        join_ranks("cuda")


def test_two_processes_evaluate_and_render_what_one_does(tmp_path, capsys):
    """Five targets and three frames: neither can be halved."""
    scene, weights = tmp_path / "garden", tmp_path / "tiny.safetensors"
    config = ProceduralConfig(size=(64, 48), num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), scene)
    torch.manual_seed(0)
    IDNeRF(ModelConfig(cascade=TINY_CASCADE)).save(weights)

    def commands(folder: str) -> list[list[str]]:
        out = tmp_path / folder
        common = ["--weights", str(weights), "--device", "cpu"]
        return [
            ["evaluate", str(scene), "--json", str(out / "report.json"), "--save", str(out / "pictures"), *common],
            ["render", str(scene), "--out", str(out / "frames"), "--frames", "3", "--depth", *common],
        ]

    for arguments in commands("one"):
        main(arguments)
    alone = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", two_ranks.__file__]
    process = subprocess.run(
        [sys.executable, *torchrun, json.dumps(commands("two"))], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("report:") == alone.count("report:") == 1  # rank 0 alone speaks

    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert [len(report["views"]) for report in reports] == [5, 5]
    assert without_seconds(reports[0]) == without_seconds(reports[1])
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert files[0] == files[1] and sum(path.suffix == ".png" for path in files[0]) > 20
    for path in files[0]:
        if path.suffix in (".png", ".npy"):
            assert Path(tmp_path / "one" / path).read_bytes() == Path(tmp_path / "two" / path).read_bytes(), path


def without_seconds(value):
    """The report without what depends on the machine."""
    if isinstance(value, dict):
        return {key: without_seconds(part) for key, part in value.items() if key != "seconds"}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value
