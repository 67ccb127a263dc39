"""Weights to share: folders and hub repositories that load bit for bit, model cards that say only what is known."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from command_line import run
from idnerf.checkpoint import FORMAT, fingerprint, locate_weights, lossless_half, read_tensors, write_tensors
from idnerf.errors import InputError
from idnerf.evaluation.report import read_report
from idnerf.models.idnerf import IDNeRF
from idnerf.models.weight_mean import mean_of_weights
from matchnerf_cases import published_gmflow
from tiny_cases import TINY_MODELS, waken

MOST_BYTES = 25_000_000


def tiny(configuration: str = "cascade", seed: int = 0) -> IDNeRF:
    torch.manual_seed(seed)
    return waken(IDNeRF(TINY_MODELS[configuration]), seed).eval()


def same(one: IDNeRF, other: IDNeRF) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def report_of(model: IDNeRF, **changes: object) -> dict:
    """A report as `idnerf evaluate` writes it."""
    means = {"psnr": 24.456, "ssim": 0.8421, "ssim_range2": 0.9012, "lpips": None}
    view = {"scene": "flo|wer", "target": 20, "sources": [1, 2], **means, "seconds": 1.0}
    own = {"views": [view], "scenes": {"flo|wer": means}, "mean": {**means, "seconds": 1.0}}
    sweep = {**own, "mean": {**means, "psnr": 22.95}}
    return {
        "idnerf": "0.1.0", "protocol": "mvsnerf", "weights": "tiny", "weights_sha256": model.fingerprint(),
        "quality": "full", "num_sources": 3, "size": [480, 320], "crop": 0.8, "device": "cpu", **own,
        "references": {"sweep": sweep}, "notes": ["lpips was left out"], **changes,
    }  # fmt: skip


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", ["cascade", "paper"])
def test_a_folder_comes_back_bit_for_bit(configuration, tmp_path):
    model = tiny(configuration)
    model.metadata = {"step": 7, "training": {"data": "walls"}}
    model.save_pretrained(tmp_path / "shared")
    names = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert names == ["README.md", "config.json", "weights.safetensors"]
    read = IDNeRF.from_pretrained(tmp_path / "shared")
    assert same(model, read) and read.config == model.config and not read.training
    assert read.metadata == model.metadata and read.fingerprint() == model.fingerprint()


def test_what_half_precision_holds_is_stored_in_half_precision(generator):
    exact = torch.randn(5, generator=generator).half().float()
    assert lossless_half(exact).dtype == torch.float16
    for value in (exact + 1e-6, exact * 1e6, torch.full((2,), torch.nan), torch.tensor([1, 2])):
        assert lossless_half(value) is value


def test_a_fingerprint_is_of_values_not_of_storage(tmp_path):
    model = tiny()
    model.save(tmp_path / "half.safetensors")
    half = IDNeRF.from_pretrained(tmp_path / "half.safetensors")
    assert half.fingerprint() == fingerprint(read_tensors(tmp_path / "half.safetensors")[0])
    assert half.fingerprint() != model.fingerprint()  # half precision lost something
    moved = tiny()
    with torch.no_grad():
        next(moved.parameters()).view(-1)[0] += 1e-6
    assert moved.fingerprint() != model.fingerprint() == tiny().fingerprint()


def test_the_default_weights_are_small_and_shared_as_they_are(tmp_path):
    model = IDNeRF.from_pretrained()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size < MOST_BYTES
    assert locate_weights("default").stat().st_size < MOST_BYTES
    assert same(model, IDNeRF.from_pretrained(tmp_path))


def test_weights_keep_what_their_file_said_through_another_save(tmp_path):
    model = tiny()
    model.save(tmp_path / "a.safetensors", step=5, training={"data": "walls"})
    IDNeRF.from_pretrained(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors", finetuned={"scene": "fern"})
    metadata = IDNeRF.from_pretrained(tmp_path / "b.safetensors").metadata
    assert metadata == {"step": 5, "training": {"data": "walls"}, "finetuned": {"scene": "fern"}}


# --- the hub ------------------------------------------------------------------------------------------------------


class Hub:
    """A hub in a folder. Stands in for HfApi (two calls) and hf_hub_download."""

    def __init__(self, folder: Path):
        self.folder, self.commits, self.made = folder, [], []

    def api(self, token=None):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False, **_):
        assert exist_ok
        self.made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        self.commits.append((repo_id, commit_message, options["revision"]))
        return f"https://hub.invalid/{repo_id}/commit/1"

    def download(self, repo_id, filename, **options):
        path = self.folder / repo_id / filename
        if not (self.folder / repo_id).exists():
            raise refused(RepositoryNotFoundError, 404)
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)


def refused(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An error of the hub's as it looks to us, whatever HTTP library is below."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error\nRequest ID: 1")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub.api)
    monkeypatch.setattr("idnerf.hub.hf_hub_download", hub.download)
    return hub


def test_pushed_weights_come_back_bit_for_bit(hub):
    model = tiny()
    address = model.push_to_hub("me/walls", private=True, model_card_kwargs={"report": report_of(model)})
    assert address == "https://hub.invalid/me/walls/commit/1"
    assert hub.made == [("me/walls", True)] and hub.commits[0][0] == "me/walls"
    assert same(model, IDNeRF.from_pretrained("me/walls"))
    card = ModelCard.load(hub.folder / "me" / "walls" / "README.md")
    assert "# walls\n" in card.text and 'from_pretrained("me/walls")' in card.text
    assert {path.suffix for path in (hub.folder / "me" / "walls").iterdir()} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1"])
def test_a_revision_is_asked_for(monkeypatch, weights, revision):
    asked = []
    monkeypatch.setattr("idnerf.hub.hf_hub_download", lambda *a, **k: (asked.append((a, k)), str(weights))[1])
    IDNeRF.from_pretrained(f"me/walls@{revision}", token="t")
    assert asked == [(("me/walls", "weights.safetensors"), {"token": "t", "revision": revision})]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refused(RepositoryNotFoundError, 404), "no such model"),
        (LocalEntryNotFoundError("not cached"), "cannot be reached"),
        (EntryNotFoundError("gone"), "pickled files are never loaded"),
        (refused(HfHubHTTPError, 500), "cannot get 'me/walls' from the hub: 500 Client Error"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(monkeypatch, error, expected):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("idnerf.hub.hf_hub_download", fail)
    with pytest.raises(InputError, match=expected) as caught:
        IDNeRF.from_pretrained("me/walls")
    assert "\n" not in str(caught.value)


def test_a_repository_of_pickled_files_is_refused_without_fetching_them(hub):
    (hub.folder / "me" / "old").mkdir(parents=True)
    (hub.folder / "me" / "old" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="holds no weights"):
        IDNeRF.from_pretrained("me/old")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refused(HfHubHTTPError, 401), "hf auth login"),
        (refused(HfHubHTTPError, 403), "hf auth login"),
        (refused(HfHubHTTPError, 500), "500 Client Error"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "cannot be reached (no route)"),
    ],
)
def test_a_push_that_fails_says_why_in_one_line(hub, error, expected):
    def fail(**_options):
        raise error

    hub.create_repo = fail
    with pytest.raises(InputError) as caught:
        tiny().push_to_hub("me/walls")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_the_hub_does_not_take(hub):
    for name in ("walls", "me/", "/walls", "me/wa lls", "me/walls/2", "me/-walls", ""):
        with pytest.raises(InputError, match="--repo-id as USER/NAME"):
            tiny().push_to_hub(name)
    assert hub.made == []


# --- cards --------------------------------------------------------------------------------------------------------


def test_a_card_parses_and_holds_the_figures_of_the_report(tmp_path):
    model = tiny()
    model.metadata = {"step": 1500, "training": {"data": "walls", "source_views": [2, 4]}}
    card = model.generate_model_card(report=report_of(model), licence="apache-2.0", repo_id="me/walls")
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.library_name == "idnerf" and read.data.license == "apache-2.0"
    assert read.data.model_name == "walls" and "nerf" in read.data.tags
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in read.data.eval_results}
    assert results[("flo|wer", "psnr")] == 24.456 and results[("mean of 1 views", "ssim")] == 0.8421
    assert not any(metric == "lpips" for _, metric in results)
    assert all("mvsnerf, 3 sources, 480x320, central 80%" in r.dataset_config for r in read.data.eval_results)
    for expected in ("| data | walls |", "| steps | 1,500 |", "| source views | 2, 4 |", "24.46 | 0.842 | 0.901",
                     "flo\\|wer", "plane sweep | 22.95", "* lpips was left out", model.fingerprint()):  # fmt: skip
        assert expected in read.text, expected


def test_a_card_without_a_report_has_no_figures_and_says_what_is_not_known():
    card = tiny().generate_model_card()
    assert card.data.eval_results is None and card.data.license is None
    for expected in ("Nothing was measured", "not recorded in the file, and not stated", "None is stated"):
        assert expected in card.text


def test_figures_of_other_weights_are_refused():
    model, other = tiny(), tiny(seed=1)
    for report in (report_of(other), {**report_of(model), "weights_sha256": None}):
        with pytest.raises(InputError, match="of other weights"):
            model.generate_model_card(report=report)


# --- the command --------------------------------------------------------------------------------------------------


def test_share_writes_a_folder_with_the_figures_of_its_own_evaluation(capsys, scene, weights, tmp_path):
    report = tmp_path / "report.json"
    code, _, error = run(capsys, "evaluate", scene, "--weights", weights, "--targets", 1, "--json", report)
    assert code == 0, error
    out = tmp_path / "shared"
    code, text, error = run(
        capsys, "share", weights, "--out", out, "--report", report, "--licence", "mit", "--data", "nothing"
    )
    assert code == 0 and "figures of 1 views" in text, error
    card = ModelCard.load(out / "README.md")
    psnr = json.loads(report.read_text())["mean"]["psnr"]
    assert f"{psnr:.2f}" in card.text and "| data | nothing |" in card.text and card.data.license == "mit"
    assert any(r.metric_value == round(psnr, 3) for r in card.data.eval_results)
    again = tmp_path / "again.json"
    assert run(capsys, "evaluate", scene, "--weights", out, "--targets", 1, "--json", again)[0] == 0
    assert json.loads(again.read_text())["weights_sha256"] == read_report(report)["weights_sha256"]


def test_share_pushes_only_when_told_to(capsys, hub, weights, tmp_path):
    assert run(capsys, "share", weights, "--out", tmp_path / "a")[0] == 0
    assert hub.made == []
    code, text, error = run(capsys, "share", weights, "--out", tmp_path / "b", "--repo-id", "me/walls")
    assert code == 0 and "pushed: https://hub.invalid/me/walls" in text, error
    assert (hub.folder / "me/walls/README.md").read_text() == (tmp_path / "b" / "README.md").read_text()
    assert "apache" not in (tmp_path / "b" / "README.md").read_text()  # nobody said so


def test_the_default_weights_are_shared_under_the_package_s_licence(capsys, tmp_path):
    assert run(capsys, "share", "default", "--out", tmp_path / "mine")[0] == 0
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "apache-2.0" and "procedural scenes" in card.text and "# mine\n" in card.text


def test_converted_and_refined_weights_say_what_they_come_from(tmp_path):
    model = tiny("paper")
    model.save(tmp_path / "a.safetensors", source="matchnerf_3v.pth", finetuned={"scene": "fern", "photos": [0, 2]})
    text = IDNeRF.from_pretrained(tmp_path / "a.safetensors").generate_model_card().text
    assert "| converted from | matchnerf_3v.pth" in text
    assert "| refined on one scene: scene | fern |" in text and "photos | 0, 2 |" in text


# --- the mean of several -----------------------------------------------------------------------------------------


def test_the_mean_of_several_weights(tmp_path, capsys):
    models = []
    for number in range(3):
        models.append(tiny(seed=number))
        models[-1].save(tmp_path / f"{number}.safetensors", half=False, step=10 * number, training={"earlier_steps": 5})
    names = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    out = tmp_path / "mean.safetensors"
    code, text, error = run(capsys, "convert", names[0], "--mean-with", *names[1:], "--out", out)
    assert code == 0 and "the mean of 3 weights" in text, error
    mean = IDNeRF.from_pretrained(out)
    for name, value in mean.state_dict().items():
        expected = sum(model.state_dict()[name] for model in models) / 3
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)
    assert mean.metadata["step"] == 25
    recorded = mean.metadata["training"]["mean_of"]
    assert all(
        name in line and model.fingerprint() in line for name, model, line in zip(names, models, recorded, strict=True)
    )
    assert names[1] in mean.generate_model_card().content


def test_a_mean_tells_what_one_of_its_weights_was_made_from(tmp_path):
    names = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    tiny(seed=0).save(names[0])
    tiny(seed=1).save(names[1], finetuned={"scene": "fern"}, source="matchnerf_3v.pth")
    metadata = mean_of_weights(names).metadata
    assert metadata["finetuned"] == {"scene": "fern"} and metadata["source"] == "matchnerf_3v.pth"


def test_the_mean_of_weights_with_themselves_is_themselves(weights):
    alone = IDNeRF.from_pretrained(weights)
    assert mean_of_weights([str(weights)] * 3).fingerprint() == alone.fingerprint()


# --- files that are no weights ------------------------------------------------------------------------------------


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files given as weights, and what must be said of each."""
    good = folder / "good.safetensors"
    tiny().save(good)
    tensors, metadata = read_tensors(good)
    content = good.read_bytes()

    def put(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def save(name: str, tensors: dict, metadata: dict) -> Path:
        write_tensors(folder / name, tensors, metadata)
        return folder / name

    torch.save({"model": {"a": torch.zeros(2)}}, folder / "model.pth")
    torch.save({"a": torch.zeros(2)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(2)}, folder / "foreign.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "older.safetensors", metadata={"format": "idnerf-0"})
    spoilt = {name: value.clone() for name, value in tensors.items()}
    next(iter(spoilt.values())).view(-1)[0] = float("nan")
    assert FORMAT != "idnerf-0"
    return {
        "empty": (put("empty.safetensors", b""), "truncated (0 bytes"),
        "cut header": (put("cut.safetensors", content[:50]), "truncated"),
        "cut tensors": (put("half.safetensors", content[: len(content) // 2]), "truncated"),
        "one byte short": (put("short.safetensors", content[:-1]), "truncated"),
        "pickled": (folder / "model.pth", "never unpickled"),
        "pickled, old": (folder / "old.bin", "`idnerf convert`"),
        "pickled under our ending": (put("p.safetensors", (folder / "model.pth").read_bytes()), "never unpickled"),
        "web page": (put("page.safetensors", b"<!DOCTYPE html><html>Sign in"), "web page"),
        "pointer": (put("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        "noise": (put("noise.safetensors", bytes(range(200, 256)) * 9), "another kind"),
        "damaged header": (put("damaged.safetensors", content[:9] + b"}}" + content[11:]), "header is damaged"),
        "of another program": (folder / "foreign.safetensors", "another program"),
        "older": (folder / "older.safetensors", "'idnerf-0', this version reads 'idnerf-1'"),
        "training state": (save("state.safetensors", {"a": torch.zeros(1)}, {"step": 1, "train_config": {}}),
                           "state of a training"),
        "encoder": (save("encoder.safetensors", published_gmflow(), {"encoder": "gmflow"}), "--encoder-init"),
        "not finite": (save("nan.safetensors", spoilt, metadata), "not finite"),
        "configuration of another kind": (save("list.safetensors", tensors, {"config": [1]}), "configuration"),
    }  # fmt: skip


WRONG = ["empty", "cut header", "cut tensors", "one byte short", "pickled", "pickled, old", "pickled under our ending",
         "web page", "pointer", "noise", "damaged header", "of another program", "older", "training state", "encoder",
         "not finite", "configuration of another kind"]  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    return wrong_files(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_weights_says_what_it_is(case, wrong, monkeypatch):
    assert sorted(wrong) == sorted(WRONG)
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr("torch.load", None)
    path, expected = wrong[case]
    with pytest.raises(InputError) as caught:
        IDNeRF.from_pretrained(path)
    text = str(caught.value)
    assert expected in text and path.name in text and "\n" not in text and len(text) < 400, text


def test_a_missing_file_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.setattr("idnerf.hub.hf_hub_download", None)
    for name in ("runs/weights.safetensors", "runs/model.pth", "/nowhere", "./a/b", "a/b/c", "nothing"):
        with pytest.raises(InputError, match="does not exist"):
            IDNeRF.from_pretrained(name)
    with pytest.raises(InputError, match="has none"):
        IDNeRF.from_pretrained(tmp_path)


def test_a_slip_below_a_folder_that_is_here_is_no_hub_id(monkeypatch, tmp_path, weights):
    asked = []
    monkeypatch.setattr("idnerf.hub.hf_hub_download", lambda *a, **_: (asked.append(a[0]), str(weights))[1])
    monkeypatch.chdir(tmp_path)
    locate_weights("runs/mien")
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no file or folder 'runs/mien': runs is a folder here"):
        locate_weights("runs/mien")
    assert asked == ["runs/mien"]


def test_the_hubs_tries_are_not_told_one_by_one(monkeypatch, capsys):
    logger = logging.getLogger("huggingface_hub.utils._http")
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())

    def out_of_reach(*_, **__):
        logger.warning("Retrying in 1s")
        raise OSError("unreachable")

    monkeypatch.setattr("idnerf.hub.hf_hub_download", out_of_reach)
    logger.addHandler(handler)
    try:
        with pytest.raises(InputError, match="unreachable"):
            IDNeRF.from_pretrained("nobody/nothing")
        assert not told
        logger.warning("of others")
        assert told == ["of others"]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read --report"),
        ("{", "no JSON"),
        ("[]", "lacks 'idnerf'"),
        ('{"idnerf": "0.1.0"}', "lacks 'protocol'"),
    ],
)
def test_a_report_that_is_none(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=expected):
        read_report(tmp_path / "report.json")
    empty = report_of(tiny(), views=[])
    (tmp_path / "report.json").write_text(json.dumps(empty))
    with pytest.raises(InputError, match="holds no scores"):
        read_report(tmp_path / "report.json")
