"""Wrong input to every command: one line that says what was expected, what came or what to do; exit code 2; no
traceback; nothing written.

A case is the command line and what its answer must hold. ``{name}`` stands for a place that ``places`` makes.
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import run
from idnerf import cli
from idnerf.checkpoint import write_tensors
from idnerf.models.idnerf import IDNeRF
from tiny_cases import TINY_MODELS

Case = tuple[str, str]

SCENES: dict[str, Case] = {
    "no such scene": ("{nowhere}", "does not exist"),
    "empty folder": ("{empty}", "found none of"),
    "a file": ("{text}", "is a file"),
    "one photo without poses": ("{one_photo}", "1 picture without poses"),
    "truncated photo": ("{truncated}", "truncated"),
    "photo that is text": ("{unreadable}", "unreadable"),
    "missing photo": ("{missing}", "lists images/001.png, but"),
    "missing poses": ("{no_poses}", "lacks 'transform_matrix'"),
    "NaN pose": ("{nan}", "pose of images/001.png"),
    "no JSON": ("{no_json}", "not readable JSON"),
    "one view": ("{one_view}", "expected at least 2"),
    "name too long": ("n" * 300, "nnnn"),
    "scan of a scene that has none": ("{scene} --scan scan1", "only DTU roots have scans"),
}
"""Scenes that are none, for every command that takes a scene: the arguments in the scene's place."""

SIZES: dict[str, Case] = {
    f"size {size}": (f"{{scene}} --size {size}", "expected --size as WIDTHxHEIGHT")
    for size in ("0x0", "-4x3", "big", "64", "64x", "64x48x3", "8x8", "64.5x48", "1000000x1000000", "64,48")
}
DEVICES: dict[str, Case] = {
    "unknown device": ("{scene} --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    "cuda without one": ("{scene} --device cuda", "finds no CUDA device"),
}
WEIGHTS: dict[str, Case] = {
    "missing weights": ("{scene} --weights none.safetensors", "which does not exist"),
    "weights that are text": ("{scene} --weights {text}", "not a readable safetensors file"),
    "pickled weights": ("{scene} --weights {pickle}", "never unpickled"),
    "truncated weights": ("{scene} --weights {cut_weights}", "truncated"),
    "folder without weights": ("{scene} --weights {empty}", "has none"),
    "name too long for weights": ("{scene} --weights " + "n" * 300, "nnnn"),
    "hub id out of reach": ("{scene} --weights nobody/nothing-of-that-name", "hub"),
}
OUTS: dict[str, Case] = {
    "out below a file": ("{scene} --out {text}/a{suffix}", "is a file, not a folder"),
    "out that cannot be written": ("{scene} --out /proc/nowhere/a{suffix}", "cannot write"),
    "out that is a folder": ("{scene} --out {taken}{suffix}", "is a folder"),
    "out with a name too long": ("{scene} --out " + "n" * 300 + "{suffix}", "cannot write nnnn"),
    "out missing": ("{scene}", "Missing"),
    "out without a value": ("{scene} --out", "Missing value for argument '--out'"),
}
FLAGS: dict[str, Case] = {
    "unknown flag": ("{scene} --colour red", "Unrecognized options: --colour"),
    "number in words": ("{scene} --num-sources many", "expected --num-sources as a whole number, got 'many'"),
}

RENDER: dict[str, Case] = {
    "no scene": ("", "Missing"),
    "unknown ending": ("{scene} --out a.jpeg2", "ending in .png, .mp4 or .gif"),
    "target and path": ("{scene} --out a.png --target 0 --path orbit", "not both"),
    "target as video": ("{scene} --out a.mp4 --target 0", "--target renders one picture"),
    "target out of range": ("{scene} --out a.png --target 9", "no view 9; it has 0-4"),
    "target in words": ("{scene} --out a.png --target first", "expected --target as a whole number, got 'first'"),
    "negative target": ("{scene} --out a.png --target -1", "no view -1"),
    "target among sources": ("{scene} --out a.png --target 1 --sources 1,2", "cannot be among its own --sources"),
    "one source": ("{scene} --out a.png --target 1 --sources 2", "at least 2"),
    "the same source twice": ("{scene} --out a.png --target 1 --sources 2,2", "at least 2"),
    "no sources": ("{scene} --out a.png --sources ,", "at least 2"),
    "source out of range": ("{scene} --out a.png --sources 0,9", "no view 9"),
    "sources in words": ("{scene} --out a.png --sources a,b", "--sources as view numbers"),
    "sources in parts": ("{scene} --out a.png --sources 0.5,1", "--sources as view numbers"),
    "too many sources": ("{scene} --out a.mp4 --num-sources 9", "expected --num-sources from 2 to"),
    "too many sources of a target": ("{scene} --out a.png --target 0 --num-sources 5", "from 2 to the 4 source views"),
    "one source by number": ("{scene} --out a.png --target 0 --num-sources 1", "--num-sources of at least 2"),
    "unknown path": ("{scene} --out a.mp4 --path zigzag", "interpolate, spiral or orbit"),
    "unknown path of a still": ("{scene} --out a.png --path zigzag", "interpolate, spiral or orbit"),
    "no frames": ("{scene} --out a.mp4 --path orbit --frames 0", "--frames of at least 1"),
    "no frames in a folder": ("{scene} --out set --frames -3", "--frames of at least 1"),
    "no frames a second": ("{scene} --out a.mp4 --fps 0", "--fps"),
    "endless frames a second": ("{scene} --out a.mp4 --fps inf", "--fps"),
    "frames a second that are none": ("{scene} --out a.gif --fps nan", "--fps"),
    "unknown quality": ("{scene} --out a.png --quality best", "--quality full or fast"),
    "unknown precision": ("{scene} --out a.png --precision half", "--precision auto, float32 or bf16"),
}

EVALUATE: dict[str, Case] = {
    "unknown protocol": ("{scene} --protocol mine", "unknown --protocol"),
    "no split for the scene": ("{scene} --protocol mvsnerf", "has no split"),
    **{f"crop of {crop}": (f"{{scene}} --crop {crop}", "--crop above 0 and at most 1")
       for crop in ("0", "-0.5", "1.2", "nan")},
    "one source": ("{scene} --num-sources 1", "--num-sources of at least 2"),
    "too many sources": ("{scene} --num-sources 5", "--num-sources must be between 2 and 4"),
    "target out of range": ("{scene} --targets 0,9", "got 9"),
    "the same target twice": ("{scene} --targets 1,1", "must not repeat"),
    "targets in words": ("{scene} --targets all", "--targets as view numbers"),
    "no targets": ("{scene} --targets ,", "--targets"),
    "unknown quality": ("{scene} --quality best", "--quality full or fast"),
    "unknown precision": ("{scene} --precision half", "--precision auto, float32 or bf16"),
    "report below a file": ("{scene} --json {text}/report.json", "is a file, not a folder"),
    "report that is a folder": ("{scene} --json {folder}", "is a folder"),
    "report that is a device": ("{scene} --json /dev/null", "expected a regular file"),
    "report that cannot be written": ("{scene} --targets 0 --json /proc/nowhere/r.json", "cannot write"),
    "pictures in the place of a file": ("{scene} --save {text}", "is a file, not a folder"),
}  # fmt: skip

EXPORT: dict[str, Case] = {
    "folder without a name": ("{scene} --out .", "name of a new folder"),
    "unknown ending": ("{scene} --out a.obj", "ending in .ply"),
    "unknown kind": ("{scene} --out a.ply --kind volume", "--kind"),
    "kind that does not fit": ("{scene} --out a.glb --kind cloud", "--kind cloud is written as .ply"),
    "folder with something in it": ("{scene} --out {folder}", "empty folder"),
    "unknown place": ("{scene} --out a.ply --at home", "--at"),
    "place and targets": ("{scene} --out a.ply --at orbit --targets 1", "not both"),
    "target out of range": ("{scene} --out a.ply --targets 9", "no view 9"),
    "no targets": ("{scene} --out a.ply --targets ,", "--targets"),
    "source out of range": ("{scene} --out a.ply --sources 0,9", "no view 9"),
    "the same source twice": ("{scene} --out a.ply --sources 2,2", "at least 2"),
    "one source each": ("{scene} --out a.ply --num-sources 1", "--num-sources"),
    "no frames": ("{scene} --out a.ply --frames 0", "--frames"),
    "voxel of zero": ("{scene} --out a.ply --voxel 0", "--voxel"),
    "confidence of two": ("{scene} --out a.ply --min-confidence 2", "--min-confidence"),
    "no views": ("{scene} --out a.ply --min-views 0", "--min-views"),
    "no tolerance": ("{scene} --out a.ply --depth-tolerance 0", "--depth-tolerance"),
    "tiny volume": ("{scene} --out a.glb --resolution 1", "--resolution"),
    "unknown depth format": ("{scene} --out set --depth-format tif", "--depth-format"),
    "depth format of a cloud": ("{scene} --out a.ply --depth-format npy", "--depth-format"),
    "normals of a mesh": ("{scene} --out a.ply --kind mesh --normals", "--normals is for a point cloud"),
    "normals of a data set": ("{scene} --out set --normals", "--normals is for a point cloud"),
    "voxels of a mesh": ("{scene} --out a.glb --voxel 0.1", "--voxel is for the points"),
    "voxels of depth maps": ("{scene} --out a.png --voxel 0.1", "--voxel is for the points"),
    "filtered depth of a mesh": ("{scene} --out a.glb --filter-depth", "--filter-depth is not for a mesh"),
    "resolution of a cloud": ("{scene} --out a.ply --resolution 64", "--resolution is for a mesh"),
    "truncation of depth maps": ("{scene} --out a.exr --truncation 3", "--truncation is for a mesh"),
    "smallest part of a data set": ("{scene} --out set --smallest-part 0", "--smallest-part is for a mesh"),
    "unknown quality": ("{scene} --out a.ply --quality best", "--quality"),
    "nothing believed": ("{scene} --out a.ply --quality fast --depth-tolerance 1e-9 --min-confidence 0",
                         "no point is left"),
}  # fmt: skip

FINETUNE: dict[str, Case] = {
    "another ending": ("{scene} --out a.pt", ".safetensors"),
    "two photos": ("{scene} --out a.safetensors --sources 0,1", "at least 3 photos"),
    "photo out of range": ("{scene} --out a.safetensors --sources 0,1,9", "no view 9"),
    "unknown test": ("{scene} --out a.safetensors --test 9", "no view 9"),
    "test photo used": ("{scene} --out a.safetensors --sources 0,1,2 --test 2", "nothing else"),
    "held out in words": ("{scene} --out a.safetensors --held-out some", "--held-out"),
    "held out not used": ("{scene} --out a.safetensors --sources 0,1,2,3 --held-out 4", "not among"),
    "all held out": ("{scene} --out a.safetensors --held-out 0,1,2", "must remain"),
    "one source": ("{scene} --out a.safetensors --num-sources 1", "--num-sources"),
    "no steps": ("{scene} --out a.safetensors --steps 0", "--steps"),
    "no time": ("{scene} --out a.safetensors --minutes 0", "--minutes"),
    "no learning": ("{scene} --out a.safetensors --lr 0", "--lr"),
    "loss that rewards errors": ("{scene} --out a.safetensors --loss.ssim -1", "--loss.ssim"),
    "guidance without latent": ("{scene} --out a.safetensors --guidance.sds-weight 1", "latent"),
}

VIEW: dict[str, Case] = {
    "port above the last": ("{scene} --port 70000", "--port from 0 to 65535"),
    "negative port": ("{scene} --port -1", "--port from 0 to 65535"),
    "port in words": ("{scene} --port http", "--port as a whole number"),
    "address of another machine": ("{scene} --host 203.0.113.7", "--host"),
    "address that is none": ("{scene} --host 300.1.1.1", "--host"),
    "one source": ("{scene} --num-sources 1", "--num-sources"),
    "more sources than views": ("{scene} --num-sources 6", "--num-sources"),
    "the same source twice": ("{scene} --sources 2,2", "--sources"),
    "source out of range": ("{scene} --sources 2,9", "no view 9"),
}

POSES: dict[str, Case] = {
    "unknown device": ("{blank_photos} --out set --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    "folder without a name": ("{blank_photos} --out .", "name of a new folder"),
    "no photos given": ("", "Missing"),
    "no such folder": ("{nowhere} --out scene", "does not exist"),
    "empty folder": ("{empty} --out scene", "holds no photos"),
    "a file": ("{text} --out scene", "is a file"),
    "one photo": ("{one_photo} --out scene", "one photo"),
    "truncated photo": ("{truncated_photos} --out scene", "truncated"),
    "photos of two shapes": ("{two_shapes} --out scene", "different shapes"),
    "too few matches": ("{blank_photos} --out scene", "too few matches"),
    "HEIC": ("{heic} --out scene", "HEIC"),
    "out with something in it": ("{blank_photos} --out {folder}", "--out"),
    "out below a file": ("{blank_photos} --out {text}/scene", "is a file, not a folder"),
    "focal length of zero": ("{blank_photos} --out scene --focal 0", "--focal"),
    "few features": ("{blank_photos} --out scene --max-features 10", "--max-features"),
    "small photos asked for": ("{blank_photos} --out scene --longer-side 10", "--longer-side"),
    "negative threads": ("{blank_photos} --out scene --threads -1", "--threads"),
}

DEMO: dict[str, Case] = {
    "no frames": ("--frames 0", "--frames of at least 1"),
    "negative frames": ("--frames -1", "--frames of at least 1"),
    "out that is a file": ("--out {text}", "is a file, not a folder"),
    "out below a file": ("--out {text}/demo", "is a file, not a folder"),
    "out that cannot be written": ("--out /proc/nowhere --frames 1", "cannot write"),
    "unknown device": ("--device tpu", "--device auto, cpu or cuda"),
    "cuda without one": ("--device cuda", "finds no CUDA device"),
    "missing weights": ("--weights none.safetensors", "which does not exist"),
    "unknown flag": ("--scene {scene}", "Unrecognized options: --scene"),
}

PROCEDURAL: dict[str, Case] = {
    "unknown device": ("--out set --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    "no out": ("", "Missing"),
    "no scenes": ("--out set --count 0", "--count"),
    "negative seed": ("--out set --seed -1 --size 32 24", "--seed"),
    **{f"size {size}": (f"--out set --size {size}", "size: expected at least 8x8")
       for size in ("0 0", "-4 3", "4 400")},
    "size in one number": ("--out set --size 32", "Missing value for argument '--size'"),
    "one view": ("--out set --num-views 1", "num-views: expected 2 or more"),
    "complexity backwards": ("--out set --complexity 0.8 0.2", "complexity"),
    "complexity of NaN": ("--out set --complexity nan nan", "complexity"),
    "no samples": ("--out set --supersample 0", "supersample"),
    "negative effects": ("--out set --photo -1", "photo"),
    "unknown rig": ("--out set --rig drone", "'drone'"),
    "out that is a file": ("--out {text}", "is a file, not a folder"),
    "out that cannot be written": ("--out /proc/nowhere --size 16 16 --num-views 2 --supersample 1", "cannot write"),
}  # fmt: skip

CONVERT: dict[str, Case] = {
    "unknown device": ("{pickle} --out a.safetensors --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    "no file given": ("", "Missing"),
    "no such file": ("{nowhere} --out a.safetensors", "found none"),
    "a folder": ("{empty} --out a.safetensors", "found none"),
    "text": ("{text} --out a.safetensors", "a file of another kind"),
    "empty file": ("{empty_file} --out a.safetensors", "empty.pth"),
    "truncated file": ("{cut_pickle} --out a.safetensors", "cut.pth"),
    "code in a pickle": ("{code} --out a.safetensors", "other objects, which are never loaded"),
    "another network": ("{pickle} --out a.safetensors", "expected a checkpoint of GMFlow"),
    "weights of our own": ("{weights} --out a.safetensors", "--weights takes it"),
    "another ending": ("{pickle} --out a.pth", "ending in .safetensors"),
    "out below a file": ("{pickle} --out {text}/a.safetensors", "is a file, not a folder"),
    "mean with nothing": ("{weights} --mean-with {nowhere} --out a.safetensors", "which does not exist"),
    "mean with others": ("{weights} --mean-with default --out a.safetensors", "one configuration"),
    "mean into another ending": ("{weights} --mean-with {weights} --out a.pth", "ending in .safetensors"),
}

SHARE: dict[str, Case] = {
    "unknown device": ("{weights} --out mine --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    "folder without a name": ("{weights} --out .", "name of a new folder"),
    "no weights given": ("", "Missing"),
    "missing weights": ("none.safetensors --out mine", "which does not exist"),
    "pickled weights": ("{pickle} --out mine", "never unpickled"),
    "folder without weights": ("{empty} --out mine", "has none"),
    "out with something in it": ("{weights} --out {folder}", "empty folder"),
    "out that is a file": ("{weights} --out {text}", "is a file, not a folder"),
    "out below a file": ("{weights} --out {text}/mine", "is a file, not a folder"),
    "out that cannot be written": ("{weights} --out /proc/nowhere/mine", "cannot write"),
    "no such report": ("{weights} --out mine --report {nowhere}", "cannot read --report"),
    "report that is text": ("{weights} --out mine --report {text}", "no JSON"),
    "report that is something else": ("{weights} --out mine --report {scene}/transforms.json", "lacks 'idnerf'"),
    "report of other weights": ("{weights} --out mine --report {report}", "of other weights"),
    "repository without user": ("{weights} --out mine --repo-id walls", "--repo-id as USER/NAME"),
    "repository with a space": ("{weights} --out mine --repo-id me/a\u00a0b", "--repo-id as USER/NAME"),
    "private folder": ("{weights} --out mine --private", "--private is for a hub repository"),
}

TRAIN: dict[str, Case] = {
    "unknown preset": ("everything", "unknown preset 'everything'"),
    "unknown flag": ("cascade-procedural --stps 3", "did you mean --steps?"),
    "no steps": ("cascade-procedural --steps 0", "--steps: expected at least 1, got 0"),
    "no batch": ("cascade-procedural --batch-size 0", "--batch-size"),
    "one source": ("cascade-procedural --source-views 1 3", "--source-views"),
    "sources backwards": ("cascade-procedural --source-views 4 2", "--source-views"),
    "tiny tile": ("cascade-procedural --tile 0 0", "--tile"),
    "no learning": ("cascade-procedural --optimizer.encoder-lr 0 --optimizer.decoder-lr 0", "--optimizer.decoder-lr"),
    "a moment that grows": ("cascade-procedural --optimizer.beta2 2", "--optimizer.beta2: expected a decay in [0, 1)"),
    "endless learning": ("cascade-procedural --optimizer.decoder-lr inf", "--optimizer.decoder-lr"),
    "last rate of NaN": ("cascade-procedural --optimizer.final-lr nan", "--optimizer.final-lr"),
    "loss that rewards errors": ("cascade-procedural --loss.mse -1", "--loss.mse: expected 0 or more"),
    "negative ramp": ("cascade-procedural --scenes.ramp-scenes -5", "--scenes.ramp-scenes"),
    "no heads": ("matchnerf-procedural --model.paper.ray-heads 0", "--model.paper.ray-heads: expected 1 or more"),
    "no hidden width": ("matchnerf-procedural --model.paper.hidden 0", "--model.paper.hidden: expected 1 or more"),
    "heads that do not divide": ("matchnerf-procedural --model.paper.ray-heads 3", "--model.paper.ray-width 16"),
    "share of two": ("cascade-procedural --fast-share 2", "--fast-share"),
    "size of zero": ("cascade-procedural --scenes.scene.size 0 0", "size"),
    "more sources than views": ("cascade-procedural --source-views 6 8 --held-out 2 --workers 0", "source"),
    "negative held out": ("cascade-procedural --held-out -1", "--held-out"),
    "unknown device": ("cascade-procedural --device tpu", "'tpu'"),
    "cuda without one": ("cascade-procedural --device cuda", "finds no CUDA device"),
    "no such run": ("cascade-procedural --resume {nowhere} --held-out 0", "training state"),
    "run folder in use": ("cascade-procedural --out {run} --held-out 0", "--resume"),
    "out that is a file": ("cascade-procedural --out {text} --held-out 0", "is a file, not a folder"),
    "weights to start from that are none": ("cascade-procedural --init {text} --held-out 0", "not a readable"),
    "model option that weights bring": (
        "cascade-procedural --init default --model.cascade.samples 6 --held-out 0",
        "--model.cascade.samples: default keeps its own, 10, and you ask for 6; add --extend",
    ),
    "model option as the preset has it": (
        "cascade-procedural --init default --model.cascade.samples=8 --held-out 0",
        "keeps its own, 10, and you ask for 8",
    ),
    "preset's part that weights lack": (
        "idnerf-procedural --init {paper} --held-out 0",
        "keeps its own, False, and you ask for True; add --extend",
    ),
    "weights with another kind of configuration": (
        "cascade-procedural --init {no_config} --held-out 0",
        "a model configuration of another kind",
    ),
    "weights of the other configuration": ("matchnerf-procedural --init default --held-out 0", "got `cascade`"),
    "encoder of the other configuration": ("cascade-procedural --encoder-init {text} --held-out 0", "--encoder-init"),
    "encoder that is none": ("matchnerf-procedural --encoder-init {text} --held-out 0", "not a readable"),
    "pool that is a file": ("cascade-procedural --scenes.pool {text} --held-out 0", "--scenes.pool: expected a folder"),
    "guidance without latent": ("cascade-procedural --guidance.sds-weight 1 --held-out 0", "latent"),
    "prior that is no folder": ("idnerf-procedural --guidance.prior.path {nowhere} --held-out 0", "prior.path"),
    "no DTU there": ("matchnerf-dtu --root {nowhere}", "nowhere"),
    "half a DTU there": ("idnerf-dtu --root {empty}", "Cameras/train"),
}

TRAIN_PRIOR: dict[str, Case] = {
    "sizes that do not divide": ("--size 50 32", "--size: expected multiples of 8"),
    "size of zero": ("--size 0 0", "--size"),
    "crop that does not divide": ("--crop 20", "--crop: expected a multiple of 8"),
    "photos larger than the network's": ("--size 640 480", "source-side"),
    "no such scenes": ("--scenes {nowhere}", "does not exist"),
    "no scene there": ("--scenes {empty}", "found none of"),
    "no such run": ("--resume {nowhere}", "training state"),
    "pool and scenes": ("--pool a --scenes b", "either --pool or --scenes"),
    "too many sources": ("--source-views 3 6", "at most 5"),
    "no learning": ("--unet-lr 0", "--unet-lr: expected above 0"),
    "no steps": ("--unet-steps 0", "--unet-steps: expected at least 1"),
    "negative threads": ("--threads -1", "--threads"),
    "nothing held out": ("--held-out 0", "--held-out"),
    "pool that is a file": ("--pool {text}", "--pool: expected a folder"),
    "out below a file": ("--out {text}/prior", "is a file, not a folder"),
    "out that is a file": ("--out {text}", "is a file, not a folder"),
    "unknown device": ("--device tpu", "--device auto, cpu or cuda"),
    "cuda without one": ("--device cuda", "finds no CUDA device"),
}


def with_out(cases: dict[str, Case], out: str) -> dict[str, Case]:
    """The cases of a command that has to be told where to write."""
    return {name: (f"{line} --out {out}", expected) for name, (line, expected) in cases.items()}


def with_suffix(suffix: str) -> dict[str, Case]:
    return {name: (line.replace("{suffix}", suffix), expected) for name, (line, expected) in OUTS.items()}


SHARED = {**SCENES, **SIZES, **DEVICES, **WEIGHTS, **FLAGS}
CHECK: dict[str, Case] = {
    "unknown device": ("{scene} --device tpu", "expected --device auto, cpu or cuda, got 'tpu'"),
    **{case: words for case, words in SCENES.items() if case not in ("one photo without poses", "one view")},
    "one photo without poses": ("{one_photo}", "found none of"),
}
CASES: dict[str, dict[str, Case]] = {
    "demo": DEMO,
    "render": {**with_out(SHARED, "a.png"), **with_suffix(".png"), **RENDER},
    "evaluate": {**SHARED, **EVALUATE},
    "train": TRAIN,
    "train-prior": TRAIN_PRIOR,
    "scenes": PROCEDURAL,
    "export": {**with_out(SHARED, "a.ply"), **with_suffix(".ply"), **EXPORT},
    "view": {**SHARED, **VIEW},
    "poses": POSES,
    "finetune": {**with_out(SHARED, "a.safetensors"), **with_suffix(".safetensors"), **FINETUNE},
    "check": CHECK,
    "share": SHARE,
    "convert": CONVERT,
}
OWN_WORDS = {
    ("render", "one photo without poses"): "one photo",  # posed first: what is wrong is that it is one
    ("export", "one photo without poses"): "one photo",
    ("view", "one photo without poses"): "one photo",
    ("finetune", "one photo without poses"): "one photo",
    ("view", "truncated photo"): None,  # read when it is looked from
    ("view", "photo that is text"): None,
    ("finetune", "one view"): "expected at least 2",
}
"""Where a command answers a shared case in another way; None: it is no error there."""

EXTRAS = {
    ("viser", "view {scene}"): ".[viewer]",
    ("pycolmap", "poses {blank_photos} --out scene"): ".[poses]",
    ("pycolmap", "render {blank_photos} --out a.png"): ".[poses]",
    ("skimage", "export {scene} --out a.glb"): ".[export]",
    ("diffusers", "train-prior --held-out 2 --num-scenes 2"): ".[prior]",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, scene, weights) -> dict[str, Path]:
    """Everything wrong that a path can lead to."""
    root = tmp_path_factory.mktemp("places")
    made = {"nowhere": root / "nowhere", "scene": scene, "weights": weights}

    def folder(name: str) -> Path:
        made[name] = root / name
        made[name].mkdir()
        return made[name]

    def copy(name: str) -> Path:
        made[name] = root / name
        shutil.copytree(scene, made[name])
        return made[name]

    def change(name: str, edit) -> None:
        path = copy(name) / "transforms.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def photos(name: str, *sizes: tuple[int, int]) -> Path:
        place = folder(name)
        for number, size in enumerate(sizes):
            Image.new("RGB", size, "grey").save(place / f"{number}.png")
        return place

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    folder("empty")
    for suffix in (".png", ".ply", ".safetensors"):
        folder(f"taken{suffix}")
    made["taken"] = root / "taken"
    (folder("folder") / "mine.txt").write_text("keep")
    made["text"] = root / "notes.txt"
    made["text"].write_text("neither a scene nor weights, nor a folder")
    cut(copy("truncated") / "images" / "001.png")
    (copy("unreadable") / "images" / "001.png").write_text("no picture")
    (copy("missing") / "images" / "001.png").unlink()
    change("no_poses", lambda content: content["frames"][1].pop("transform_matrix"))
    change("nan", lambda content: content["frames"][1]["transform_matrix"][0].__setitem__(3, float("nan")))
    change("one_view", lambda content: content.update(frames=content["frames"][:1]))
    cut(copy("no_json") / "transforms.json")
    photos("one_photo", (64, 48))
    photos("blank_photos", (64, 48), (64, 48), (64, 48))
    cut(photos("truncated_photos", (640, 480), (640, 480)) / "1.png")
    photos("two_shapes", (64, 48), (64, 48), (64, 64))
    (folder("heic") / "a.heic").write_bytes(b"ftypheic")

    made["pickle"], made["cut_pickle"], made["code"] = (root / name for name in ("a.pth", "cut.pth", "code.pth"))
    for path in (made["pickle"], made["cut_pickle"]):
        torch.save({"conv.weight": torch.zeros(100)}, path)
    cut(made["cut_pickle"])
    torch.save({"trap": Trap(root / "sprung")}, made["code"])
    made["empty_file"] = root / "empty.pth"
    made["empty_file"].touch()
    made["cut_weights"] = root / "cut.safetensors"
    made["cut_weights"].write_bytes(weights.read_bytes()[:5000])
    run_folder = folder("run")
    (run_folder / "training_state.safetensors").touch()
    made["paper"], made["no_config"] = root / "paper.safetensors", root / "no_config.safetensors"
    IDNeRF(TINY_MODELS["paper"]).save(made["paper"])
    write_tensors(made["no_config"], {"x": torch.zeros(1)}, {"config": "none"})
    made["report"] = root / "report.json"
    keys = ("idnerf", "protocol", "weights", "weights_sha256", "num_sources", "size", "crop", "device")
    scores = {"views": [{}], "scenes": {"a": {}}, "mean": {}}
    made["report"].write_text(json.dumps({**dict.fromkeys(keys, "x"), **scores}))
    return made


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def filled(line: str, places: dict[str, Path]) -> list[str]:
    """A command line with its places filled in."""
    words = []
    for word in line.split(" "):
        for name, place in places.items():
            word = word.replace("{" + name + "}", str(place))
        if word:
            words.append(word)
    return words


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def assert_refused(capsys, arguments: list[str], expected: str, watched: list[Path]) -> None:
    """One line, exit code 2, and nothing written below the folders watched."""
    before = [contents(folder) for folder in watched]
    code, out, error = run(capsys, *arguments)
    assert code == 2, (code, out, error)
    assert expected in error, error
    assert error.startswith("idnerf: ") and error.count("\n") == 1 and len(error) < 600, error
    assert [contents(folder) for folder in watched] == before


ALL = [(command, case) for command, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("command", "case"), ALL, ids=[f"{command}: {case}" for command, case in ALL])
def test_wrong_input_is_one_line_and_leaves_nothing(command, case, capsys, monkeypatch, places, tmp_path):
    line, expected = CASES[command][case]
    expected = OWN_WORDS.get((command, case), expected)
    if expected is None:
        pytest.skip("no error of this command")
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if "/proc" in line and not sys.platform.startswith("linux"):
        pytest.skip("no /proc")
    need = {"poses": "pycolmap", "view": "viser", "train-prior": "diffusers"}
    if command in need:
        pytest.importorskip(need[command])
    arguments = [command, *filled(line, places)]
    takes_weights = command in ("demo", "render", "evaluate", "export", "view", "finetune")
    if takes_weights and "--weights" not in arguments:
        arguments += ["--weights", str(places["weights"])]
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, arguments, expected, [tmp_path, places["text"].parent])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "idnerf: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; check its permissions"),
        (ConnectionError("refused\nby the other side"), "idnerf: refused\n"),
    ],
)
def test_errors_of_the_system_are_one_line(error, expected, capsys, monkeypatch):
    def main(_):
        raise error

    monkeypatch.setattr(cli, "main", main)
    code, _, said = run(capsys, "check")
    assert code == 2 and expected in said and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read and write everywhere")
def test_a_folder_that_may_not_be_looked_into(capsys, scene, weights, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    for arguments in (["check", locked], ["render", scene, "--out", locked / "sub" / "a.png", "--weights", weights]):
        code, _, error = run(capsys, *arguments)
        assert code == 2 and "Permission denied" in error and error.count("\n") == 1


@pytest.mark.parametrize(("package", "line"), EXTRAS)
def test_a_missing_extra_is_named(package, line, capsys, monkeypatch, places, tmp_path):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    arguments = filled(line, places)
    assert_refused(capsys, arguments, EXTRAS[package, line], [tmp_path, places["text"].parent])


def test_every_command_is_tried():
    assert set(CASES) == set(cli.COMMANDS)
    assert all("unknown device" in cases for cases in CASES.values())


def test_no_command_and_an_unknown_one(capsys):
    code, out, error = run(capsys)
    assert code == 2 and out.startswith("usage: idnerf") and not error
    assert_refused(capsys, ["paint"], "unknown command 'paint': expected one of demo", [])
    assert_refused(capsys, ["--colour"], "unknown command '--colour'", [])


def test_a_pickle_never_springs_its_trap(places):
    assert not (places["code"].parent / "sprung").exists()
    torch.load(places["code"], weights_only=False)  # it would have
    (places["code"].parent / "sprung").unlink()
