"""`idnerf share`: weights with their model card, as a folder or on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import tyro

from idnerf.commands.options import check_writable, choose_device
from idnerf.errors import InputError
from idnerf.evaluation.report import read_report
from idnerf.export.atomic import check_new_folder, whole_folder
from idnerf.hub import WEIGHTS_FILE, check_repo_id
from idnerf.models.idnerf import IDNeRF

DEFAULT_FACTS = {"licence": "apache-2.0", "data": "procedural scenes of idnerf, generated; no photo"}
"""Of the weights that come with the package, which are under its licence."""


def share(
    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")],
    out: Path,
    *,
    report: Path | None = None,
    repo_id: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    data: str | None = None,
    private: bool = False,
    device: str = "auto",
) -> None:
    """Write a folder of weights and model card that others load; with --repo-id push it to the Hugging Face hub too.

    Args:
        weights: `default`, a file, a run folder or a hub id.
        out: new folder: weights.safetensors, config.json, README.md (the model card).
        report: what `idnerf evaluate --json` wrote for these weights. The card's figures come from nowhere else.
        repo_id: the hub repository to push to, as USER/NAME (log in before: `hf auth login`). Nothing is sent without.
        name: title of the card. Default: that of the repository or of the folder.
        licence: of the weights, such as apache-2.0. Default: that of the package for its own weights, else none.
        data: what the weights were trained on, in words. Default: what their file records.
        private: make the repository a private one.
        device: auto, cpu or cuda, as for every command; this one needs the CPU alone.
    """
    choose_device(device)
    if repo_id is not None:
        check_repo_id(repo_id)
    if private and repo_id is None:
        raise InputError("--private is for a hub repository: give --repo-id USER/NAME too")
    check_writable(out, folder=True)
    check_new_folder(out)
    scores = None if report is None else read_report(report)
    model = IDNeRF.from_pretrained(weights)
    facts = DEFAULT_FACTS if weights == "default" else {}
    card = {
        "report": scores,
        "licence": licence or facts.get("licence"),
        "data": data or (None if model.metadata.get("training") else facts.get("data")),
        "name": name or (None if repo_id else out.resolve().name),
    }
    with whole_folder(out) as folder:
        model.save_pretrained(folder, model_card_kwargs={**card, "repo_id": repo_id})
    size = (out / WEIGHTS_FILE).stat().st_size / 1e6
    measured = "no figures: give --report" if scores is None else f"figures of {len(scores['views'])} views"
    print(f"{out}: {WEIGHTS_FILE} ({size:.1f} MB), config.json, README.md ({measured})")
    if repo_id is not None:
        print(f"pushed: {model.push_to_hub(repo_id, private=private or None, model_card_kwargs=card)}")
