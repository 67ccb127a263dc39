"""What of DTU is there: a downloaded folder is checked by names and headers before hours of training depend on it."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from idnerf.data.dtu import IMAGE_SIZE, read_camera_file, scan_pictures, scans
from idnerf.data.image_io import DAMAGED
from idnerf.errors import InputError
from idnerf.evaluation.protocols import load_table
from idnerf.training.dtu_scenes import read_pairs

VIEWS = 49
"""Camera positions of the training layout."""


@dataclass(frozen=True)
class DTULayout:
    """What a DTU root holds.

    Attributes:
        cameras: ids that have a sound camera file.
        paired: views that ``pair.txt`` names partners of.
        training, test: scans of the published lists that have pictures.
        views: (fewest, most) camera positions photographed in a scan of either list.
        lights: lights that every training scan was photographed under.
        with_depth: scans of either list that have depth maps.
        training_problems, test_problems: what keeps the published training, and the published evaluation, from running
            on what is there; empty where nothing does.
    """

    root: Path
    cameras: frozenset[int]
    paired: int
    training: tuple[str, ...]
    test: tuple[str, ...]
    views: tuple[int, int]
    lights: frozenset[int]
    with_depth: int
    training_problems: tuple[str, ...]
    test_problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """The layout in words."""
        table = load_table("dtu")
        lights = " ".join(map(str, sorted(self.lights))) or "none in common"
        fewest, most = self.views
        lines = [
            f"{self.root}: DTU, training layout",
            f"  cameras     {len(self.cameras)} of {VIEWS} camera files; pair.txt: "
            + (f"{self.paired} views" if self.paired else "none"),
            f"  training    {len(self.training)} of {len(table['training_scans'])} scans; lights {lights}",
            f"  test        {len(self.test)} of {len(table['test_scans'])} scans",
            f"  views       {fewest if fewest == most else f'{fewest} to {most}'} of {VIEWS} a scan",
            f"  depth maps  {self.with_depth} of {len(self.training) + len(self.test)} scans "
            "(for the evaluation; training by colour needs none)",
        ]
        for what, problems in (("training", self.training_problems), ("evaluation", self.test_problems)):
            lines += [f"{what}: ready"] if not problems else [f"{what}: {problem}" for problem in problems]
        return lines


def inspect_dtu(root: Path) -> DTULayout:
    """Look at the names of all files, every camera file, and the header of one picture per scan.

    Raises:
        InputError: no ``Cameras/train`` or no ``Rectified``, a damaged camera file, picture or ``pair.txt``.
    """
    for needed in (root / "Cameras" / "train", root / "Rectified"):
        if not needed.is_dir():
            raise InputError(f"{root} is no DTU root: expected {needed}, from dtu_training.rar (docs/dtu.md)")
    table = load_table("dtu")
    found = set(scans(root))
    training = tuple(name for number in table["training_scans"] if (name := f"scan{number}") in found)
    test = tuple(name for number in table["test_scans"] if (name := f"scan{number}") in found)
    cameras = camera_ids(root)
    pairs_path = root / "Cameras" / "pair.txt"
    pairs = read_pairs(pairs_path) if pairs_path.is_file() else {}
    pictures = {scan: pictures_of(root, scan) for scan in (*training, *test)}
    counts = [len({view for view, _ in shots}) for shots in pictures.values()] or [0]

    general = [f"{scan} has no pictures such as rect_001_3_r5000.png" for scan, shots in pictures.items() if not shots]
    general += [
        f"{scan} has pictures of view {min(lacking)}, but Cameras/train has no {min(lacking):08d}_cam.txt"
        for scan, shots in pictures.items()
        if (lacking := {view for view, _ in shots} - cameras)
    ]
    training_problems = list(general)
    if not training:
        training_problems.append("no training scan: expected Rectified/scan3_train and so on")
    if not pairs:
        training_problems.append("no Cameras/pair.txt: the sources of a training are drawn from it")
    elif cameras - set(pairs):
        training_problems.append(f"pair.txt has no entry for view {min(cameras - set(pairs))}")
    wanted = {*table["any_scene"]["sources"], *table["any_scene"]["targets"]}
    test_problems = list(general)
    if not test:
        test_problems.append("no test scan: expected Rectified/scan1_train and so on")
    for scan in test:
        lacking = wanted - {view for view, light in pictures[scan] if light == table["light"]}
        if lacking:
            test_problems.append(f"{scan} lacks view {min(lacking)} under light {table['light']}")
    if test and not all(has_depth(root, scan) for scan in test):
        test_problems.append("a test scan has no depth maps: its whole image would be scored, not the foreground")
    lights = [frozenset(light for _, light in pictures[scan]) for scan in training]
    return DTULayout(
        root,
        frozenset(cameras),
        len(pairs),
        training,
        test,
        (min(counts), max(counts)),
        frozenset.intersection(*lights) if lights else frozenset(),
        sum(has_depth(root, scan) for scan in pictures),
        tuple(training_problems),
        tuple(test_problems),
    )


def camera_ids(root: Path) -> set[int]:
    """Ids of the camera files, every one of them read. Raises InputError for a bad one."""
    files = sorted((root / "Cameras" / "train").glob("*_cam.txt"))
    for file in files:
        read_camera_file(file)
    return {int(file.name.removesuffix("_cam.txt")) for file in files if file.name[:8].isdigit()}


def pictures_of(root: Path, scan: str) -> set[tuple[int, int]]:
    """(camera id, light) of a scan's pictures. Raises InputError where they are damaged or of another size."""
    pictures = scan_pictures(root, scan)
    if pictures:
        first = min(pictures.values())
        try:
            with Image.open(first) as picture:
                size = picture.size
        except DAMAGED as error:
            raise InputError(f"{first} is damaged ({error}); unpack it again") from None
        if size != IMAGE_SIZE:
            raise InputError(f"{first} is {size[0]}x{size[1]}: expected 640x512, the training layout's")
    return set(pictures)


def has_depth(root: Path, scan: str) -> bool:
    return any((root / "Depths" / scan).glob("depth_map_*.pfm"))
