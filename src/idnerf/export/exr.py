"""OpenEXR files of one float channel: uncompressed scan lines, the plainest form the format has (openexr.com)."""

import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from idnerf.export.atomic import whole_file

_MAGIC, _VERSION = 20000630, 2
_FLOAT, _NO_COMPRESSION, _INCREASING_Y = 2, 0, 0


def write_exr(path: Path, values: Float[Tensor, "height width"], channel: str = "Z") -> None:
    """Write one float32 channel; ``Z`` is OpenEXR's name for depth.

    Raises:
        InputError: the place cannot be written.
    """
    pixels = np.ascontiguousarray(values.detach().cpu().numpy(), dtype="<f4")
    height, width = pixels.shape
    header = struct.pack("<ii", _MAGIC, _VERSION) + b"".join(_attributes(width, height, channel)) + b"\0"
    # Each scan line: its y, its number of bytes, its pixels. The header is followed by the lines' places in the file.
    line_size = 8 + 4 * width
    first = len(header) + 8 * height
    offsets = (first + line_size * np.arange(height, dtype="<u8")).tobytes()
    lines = np.empty(height, dtype=[("y", "<i4"), ("size", "<i4"), ("pixels", "<f4", (width,))])
    lines["y"], lines["size"], lines["pixels"] = np.arange(height), 4 * width, pixels
    with whole_file(path) as temporary:
        temporary.write_bytes(header + offsets + lines.tobytes())


def _attributes(width: int, height: int, channel: str) -> list[bytes]:
    def attribute(name: str, kind: str, value: bytes) -> bytes:
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value

    # name, pixel type, perceptually linear, three reserved bytes, sampling in x and y
    channels = channel.encode() + b"\0" + struct.pack("<iBBBBii", _FLOAT, 0, 0, 0, 0, 1, 1) + b"\0"
    window = struct.pack("<iiii", 0, 0, width - 1, height - 1)
    return [
        attribute("channels", "chlist", channels),
        attribute("compression", "compression", struct.pack("<B", _NO_COMPRESSION)),
        attribute("dataWindow", "box2i", window),
        attribute("displayWindow", "box2i", window),
        attribute("lineOrder", "lineOrder", struct.pack("<B", _INCREASING_Y)),
        attribute("pixelAspectRatio", "float", struct.pack("<f", 1.0)),
        attribute("screenWindowCenter", "v2f", struct.pack("<ff", 0.0, 0.0)),
        attribute("screenWindowWidth", "float", struct.pack("<f", 1.0)),
    ]
