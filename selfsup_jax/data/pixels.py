"""One encoded image -> its pixels: `[H, W, 3]` uint8, upright.

Pillow decodes all but plain JPEGs, which simplejpeg decodes to the same pixels in four fifths of
the time. Images with more than 8 bits per channel are `deep` here.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from typing import Any

import numpy as np
import simplejpeg
from absl import logging
from PIL import ExifTags, Image, ImageFile

Encoded = str | bytes  # a path, or the content of a file
HEAD = 2048  # bytes, in which a JPEG's EXIF data begin


@dataclasses.dataclass(frozen=True)
class Reading:
    """How encoded images become pixels: the same for all images of a run.

    Attributes:
        intensity: of deep images: see `configs/common.py`; `auto` if no deep image was expected.
        exif_orientation: whether images are turned as their EXIF orientation says.
    """

    intensity: str = "auto"
    exif_orientation: bool = True


def size(image: Encoded, reading: Reading) -> tuple[int, int]:
    """(height, width) as `decoded` has it, from the header; (1, 1) if it cannot be read."""
    try:
        with _open(image) as file:
            swapped = reading.exif_orientation and _orientation(file) >= 5
            return (file.width, file.height) if swapped else (file.height, file.width)
    except Exception:  # Pillow raises many types for damaged files
        return 1, 1


class Room:
    """Memory for a few decoded images, to be used again for the next few.

    In fresh memory decoding takes up to a fifth longer, because the system fills it with zeros.

    Args:
        size: in bytes. An image that does not fit any more gets memory of its own.
    """

    def __init__(self, size: int):
        self._all, self._used = np.empty(size, np.uint8), 0

    def clear(self) -> None:
        """Forgets all images, whose memory others may get now."""
        self._used = 0

    def take(self, size: int) -> np.ndarray | None:
        """So many bytes, or None if they are not there."""
        if self._used + size > len(self._all):
            return None
        self._used += size
        return self._all[self._used - size : self._used]


def decoded(
    image: Encoded, reading: Reading, largest: int = 0, room: Room | None = None
) -> np.ndarray | None:
    """`[H, W, 3]` uint8 of the first frame, or None if the image cannot be decoded.

    With `largest`, an image with a longer side is made smaller: a JPEG while it is decoded, to as
    many eighths of its size as fit. With `room`, the result may lie there.
    """
    try:
        if isinstance(image, str):
            with open(image, "rb") as file:
                image = file.read()
        rgb = _plain_jpeg(image, reading, largest, room)
        rgb = _by_pillow(image, reading) if rgb is None else rgb
        return _fitted(rgb, largest) if largest and max(rgb.shape) > largest else rgb
    except Exception:  # of many types, for damaged files
        return None


def _plain_jpeg(
    image: bytes, reading: Reading, largest: int, room: Room | None
) -> np.ndarray | None:
    """The pixels of an upright JPEG in colour or gray, else None; raises if it is damaged."""
    if not image.startswith(b"\xff\xd8\xff"):
        return None
    if reading.exif_orientation and b"Exif" in image[:HEAD]:
        with _open(image) as file:
            if _orientation(file) != 1:
                return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(image)
        if space not in ("YCbCr", "Gray"):
            return None
        into = room.take(3 * height * width) if room else None
        if not 0 < largest < max(height, width):
            return simplejpeg.decode_jpeg(image, buffer=into)
        eighths = max(8 * largest // max(height, width), 1)
        at_least = [-(-side * eighths // 8) for side in (height, width)]
        return simplejpeg.decode_jpeg(
            image, min_height=at_least[0], min_width=at_least[1], buffer=into
        )
    except ValueError:
        return None  # Pillow decides what is too damaged


def _by_pillow(image: bytes, reading: Reading) -> np.ndarray:
    with _open(image) as file:
        turned = _orientation(file) if reading.exif_orientation else 1
        if is_deep(file):
            rgb = to_uint8(_values(file, image), reading.intensity)
        else:
            rgb = np.asarray(file.convert("RGB"))
    return np.ascontiguousarray(_UPRIGHT[turned](rgb)) if turned != 1 else rgb


def _fitted(rgb: np.ndarray, largest: int) -> np.ndarray:
    image = Image.fromarray(rgb)
    image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
    return np.asarray(image)


def frames(image: Encoded) -> int:
    """How many pages or frames a file has, of which `decoded` takes the first; 1 if damaged."""
    try:
        with _open(image) as file:
            return getattr(file, "n_frames", 1)
    except Exception:
        return 1


def deep_values(image: Encoded) -> np.ndarray | None:
    """`[H, W, channels]`, the values of a deep image; None if it is not deep or damaged."""
    try:
        with _open(image) as file:
            return _values(file, image) if is_deep(file) else None
    except Exception:
        return None


def is_deep(file: ImageFile.ImageFile) -> bool:
    """Whether an open image has more than 8 bits per channel.

    Raises:
        ValueError: it is one that Pillow would read wrongly, without an error.
    """
    tags = getattr(file, "tag_v2", {})
    deep = file.mode[0] in "IF" or max(tags.get(ExifTags.Base.BitsPerSample, (8,))) > 8
    deep = deep or any(";16" in _raw_mode(tile) for tile in file.tile)
    if deep and tags.get(ExifTags.Base.PlanarConfiguration, 1) != 1 and len(file.getbands()) > 1:
        raise ValueError("channels of 16 bits after each other")
    return deep


def to_uint8(values: np.ndarray, intensity: str) -> np.ndarray:
    """`[H, W, 1 or 3]` of any numbers -> `[H, W, 3]` uint8; see `Reading.intensity`.

    Raises:
        ValueError: numbers other than 16 bits without a range.
    """
    if intensity == "auto":
        _warn_of_a_deep_image()
    if intensity in ("auto", "full"):
        if values.dtype != np.uint16:
            raise ValueError(f"{values.dtype} has no full range")
        scaled = (values >> 8).astype(np.uint8)
    else:
        low, high = black_and_white(values) if intensity == "per_image" else range_of(intensity)
        known = values.dtype == np.uint16 and intensity != "per_image"
        scaled = _table(low, high)[values] if known else _scaled(values, low, high)
    return np.repeat(scaled, 3, axis=-1) if scaled.shape[-1] == 1 else scaled


def black_and_white(values: np.ndarray) -> tuple[float, float]:
    """The range that 99.8 % of the finite values lie in; it is never empty."""
    low, high = np.percentile(values[np.isfinite(values)], (0.1, 99.9), method="nearest")
    return float(low), float(high) if high > low else float(low) + 1.0


def range_of(intensity: str) -> tuple[float, float]:
    """`"0,4095"` -> `(0.0, 4095.0)`; raises `ValueError` if it is no range."""
    low, high = (float(text) for text in intensity.strip("()[] ").split(","))
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"{intensity} is empty")
    return low, high


@functools.lru_cache(maxsize=4)
def _table(low: float, high: float) -> np.ndarray:
    return _scaled(np.arange(2**16), low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = (np.nan_to_num(values.astype(np.float64)) - low) / (high - low)
    return np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8)


@functools.cache
def _warn_of_a_deep_image() -> None:
    logging.warning(
        "an image has 16 bits, though none of those looked at had: 0 is black and 65535 white; "
        "config.data.intensity sets the range"
    )


def _open(image: Encoded) -> ImageFile.ImageFile:
    file = Image.open(image if isinstance(image, str) else io.BytesIO(image))
    if file.format == "TIFF":
        file.filename = ""  # else Pillow maps the file, and mixes up the rows of turned images
    return file


_UPRIGHT: dict[int, Any] = {  # EXIF orientation -> `[H, W, C]` upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def _orientation(file: ImageFile.ImageFile) -> int:
    if "exif" not in file.info or file.format == "TIFF":  # Pillow itself turns TIFFs
        return 1
    if file.format in ("JPEG", "MPO") and not _starts_with_exif(file):
        return 1
    try:
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data in a good image
        return 1
    return value if value in _UPRIGHT else 1


def _starts_with_exif(file: ImageFile.ImageFile) -> bool:
    """Whether a JPEG's tags are where the standard has them; `_plain_jpeg` looks only there."""
    assert file.fp is not None
    position = file.fp.tell()
    file.fp.seek(0)
    has_exif = b"Exif" in file.fp.read(HEAD)
    file.fp.seek(position)
    return has_exif


def _values(file: ImageFile.ImageFile, image: Encoded) -> np.ndarray:
    """`[H, W, 1 or 3]`: Pillow has no colour images of 16 bits, but decodes their high bytes.

    It is made to decode their low bytes too, as if these were the high ones.
    """
    if file.mode[0] in "IF":
        values = np.asarray(file)
        if file.mode.startswith("I;16"):
            values = values.astype(np.uint16)  # in this machine's byte order
        return values[..., None]
    mode = _raw_mode(file.tile[0])
    if mode == "LA;16B":  # gray with alpha: two bytes of gray, two of alpha
        _set_raw_mode(file, "RGBA")
        high, low = (np.asarray(file)[..., i : i + 1].astype(np.uint16) for i in range(2))
        return high << 8 | low
    swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[mode[-1]]
    with _open(image) as other:
        _set_raw_mode(other, mode[:-1] + swapped)
        high, low = (np.asarray(x)[..., :3].astype(np.uint16) for x in (file, other))
    return high << 8 | low


def _raw_mode(tile: Any) -> str:
    args = tile.args or ""
    return args if isinstance(args, str) else str(args[0])


def _set_raw_mode(file: ImageFile.ImageFile, mode: str) -> None:
    file.tile = [
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *(tile.args or ())[1:]))
        for tile in file.tile
    ]
