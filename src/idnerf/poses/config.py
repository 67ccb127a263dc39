"""Options of finding poses."""

from dataclasses import dataclass

from idnerf.errors import InputError
from idnerf.processors import usable_processors


@dataclass(frozen=True)
class PosesConfig:
    """How to find the poses of photos."""

    longer_side: int = 1600
    """Photos are shrunk to this many pixels on the longer side before features are looked for."""
    max_features: int = 8192
    """Features per photo; more than 16 photos take half as many, more than 40 a quarter."""
    focal: float | None = None
    """Focal length in pixels of the photos, where you know it. Default: from EXIF; without EXIF it is estimated."""
    threads: int = 0
    """Processor threads; 0 takes all there are."""
    seed: int = 0
    """Seed of the random draws; the same photos, seed and one thread give the same poses."""

    def __post_init__(self) -> None:
        if self.longer_side < 200:
            raise InputError(f"expected --longer-side of at least 200 pixels, got {self.longer_side}")
        if self.max_features < 500:
            raise InputError(f"expected --max-features of at least 500, got {self.max_features}")
        if self.focal is not None and not 1 < self.focal < 1e6:
            raise InputError(f"expected --focal in pixels, such as 3000; got {self.focal:g}")
        if self.threads < 0:
            raise InputError(f"expected --threads of 1 or more, or 0 for all; got {self.threads}")

    @property
    def thread_count(self) -> int:
        return self.threads or usable_processors()

    def features_for(self, photo_count: int) -> int:
        """Matching every pair costs photos^2 x features^2; many photos need fewer features each."""
        return self.max_features // (1 if photo_count <= 16 else 2 if photo_count <= 40 else 4)
