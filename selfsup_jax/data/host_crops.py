"""Random resized crops on the host with TensorFlow, for images that are decoded during training.

The boxes are those of `crops.py`, up to a pixel where a rounding of `exp` decides (3 of 156,000);
the pixels differ by at most one grey level, at the edges of a JPEG's window by four.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from selfsup_jax.data import pixels
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.data.host_tensorflow import tf
from selfsup_jax.data.pixels import Reading

_DCT = "INTEGER_ACCURATE"  # exactly the pixels that Pillow decodes; TensorFlow's default is rougher


def boxes_from_draws(
    draws: tf.Tensor, height: tf.Tensor, width: tf.Tensor, spec: CropSpec
) -> tf.Tensor:
    """Crop boxes for an image of `height` x `width` pixels.

    The first attempt that fits into the image is used; if none fits, the largest centre crop with
    an allowed aspect.

    Args:
        draws: `[views, attempts, 4]` uniform in [0, 1): area, aspect, row, column.
        height, width: int32 scalars.
        spec: ranges of area and aspect.

    Returns:
        `[views, 4]` int32: top, left, height, width.
    """
    rows, columns = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    low, high = spec.area
    area = rows * columns * (low + (high - low) * draws[..., 0])
    log_low, log_high = tf.math.log(spec.aspect[0]), tf.math.log(spec.aspect[1])
    aspect = tf.exp(log_low + (log_high - log_low) * draws[..., 1])
    box_w = tf.round(tf.sqrt(area * aspect))
    box_h = tf.round(tf.sqrt(area / aspect))
    fits = (box_w >= 1) & (box_h >= 1) & (box_w <= columns) & (box_h <= rows)
    top = tf.floor(draws[..., 2] * (rows - box_h + 1))
    left = tf.floor(draws[..., 3] * (columns - box_w + 1))
    attempts = tf.stack([top, left, box_h, box_w], axis=-1)  # [views, attempts, 4]
    chosen = tf.gather(attempts, tf.argmax(fits, axis=1), axis=1, batch_dims=1)

    ratio = tf.clip_by_value(columns / rows, spec.aspect[0], spec.aspect[1])
    centre_w = tf.round(tf.minimum(columns, rows * ratio))
    centre_h = tf.round(tf.minimum(rows, columns / ratio))
    centre = tf.stack(
        [(rows - centre_h) // 2, (columns - centre_w) // 2, centre_h, centre_w], axis=-1
    )
    return tf.cast(tf.where(tf.reduce_any(fits, axis=1)[:, None], chosen, centre), tf.int32)


def boxes_of_views(
    draws: tf.Tensor, height: tf.Tensor, width: tf.Tensor, specs: Sequence[CropSpec]
) -> tf.Tensor:
    """`boxes_from_draws` with one spec per view."""
    boxes, first = [], 0
    for spec, members in itertools.groupby(specs):
        count = len(list(members))
        boxes.append(boxes_from_draws(draws[first : first + count], height, width, spec))
        first += count
    return tf.concat(boxes, axis=0)


def crop_encoded(
    encoded: tf.Tensor, draws: tf.Tensor, specs: Sequence[CropSpec], reading: Reading
) -> list[tf.Tensor]:
    """The views of an encoded image, `[size, size, 3]` uint8 each.

    Of an upright JPEG only the window that contains all crops is decoded, once.
    """

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.image.extract_jpeg_shape(encoded)
        boxes = boxes_of_views(draws, shape[0], shape[1], specs)
        start = tf.reduce_min(boxes[:, :2], axis=0)
        end = tf.reduce_max(boxes[:, :2] + boxes[:, 2:], axis=0)
        window = tf.concat([start, end - start], axis=0)
        image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method=_DCT)
        return image, boxes - tf.concat([start, [0, 0]], axis=0)

    def other() -> tuple[tf.Tensor, tf.Tensor]:
        image = _decode_other(encoded, reading)
        shape = tf.shape(image)
        return image, boxes_of_views(draws, shape[0], shape[1], specs)

    image, boxes = tf.cond(_is_upright_jpeg(encoded, reading), jpeg, other)
    return crop_and_resize(image, boxes, specs)


def decode(encoded: tf.Tensor, reading: Reading) -> tf.Tensor:
    """A whole image, `[H, W, 3]` uint8; of an animation, the first frame."""
    return tf.cond(
        _is_upright_jpeg(encoded, reading),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT),
        lambda: _decode_other(encoded, reading),
    )


def _decode_other(encoded: tf.Tensor, reading: Reading) -> tf.Tensor:
    """A whole image that is no upright JPEG. PNGs take TensorFlow two thirds of Pillow's time."""

    def by_tensorflow() -> tf.Tensor:
        return tf.io.decode_png(encoded, channels=3)

    def by_pillow() -> tf.Tensor:
        def decoded(image: Any) -> np.ndarray:
            found = pixels.decoded(_bytes(image), reading)
            # An exception would be logged with its traceback for each broken image.
            return np.zeros((0, 0, 3), np.uint8) if found is None else found

        image = tf.numpy_function(decoded, [encoded], tf.uint8, stateful=False)
        with tf.control_dependencies([tf.debugging.Assert(tf.size(image) > 0, ["broken"])]):
            return tf.ensure_shape(image, (None, None, 3))

    head = tf.strings.join([tf.strings.substr(encoded, 0, 64), tf.constant(bytes(64))])

    def at(position: int, text: bytes) -> tf.Tensor:
        return tf.equal(tf.strings.substr(head, position, len(text)), text)

    # Of most PNGs the first bytes say that they have no tags, and not 16 bits.
    surely = at(0, b"\x89PNG") & at(37, b"IDAT") & ~at(24, b"\x10")
    unsure = at(0, b"\x89PNG") & ~surely
    plain = surely | _asked(unsure, encoded, lambda image: pixels.is_plain(image, reading))
    return tf.cond(plain, by_tensorflow, by_pillow)


def _is_upright_jpeg(encoded: tf.Tensor, reading: Reading) -> tf.Tensor:
    """Whether TensorFlow gives the pixels of `pixels.decoded`, which takes longer.

    Pillow is asked only if there are EXIF data: it takes 0.1 ms, and decoding 1 or 2.
    """
    is_jpeg = tf.io.is_jpeg(encoded)
    if not reading.exif_orientation:
        return is_jpeg
    head = tf.strings.substr(encoded, 0, pixels.HEAD)
    has_exif = is_jpeg & tf.strings.regex_full_match(head, r"\C*Exif\C*")
    upright = _asked(has_exif, encoded, lambda image: pixels.is_plain(image, reading))
    return is_jpeg & (upright | ~has_exif)


def _asked(
    condition: tf.Tensor, encoded: tf.Tensor, question: Callable[[bytes], bool]
) -> tf.Tensor:
    """`condition and question(encoded)`."""

    def ask() -> tf.Tensor:
        def answer(image: Any) -> np.bool_:
            return np.bool_(question(_bytes(image)))

        return tf.numpy_function(answer, [encoded], tf.bool, stateful=False)

    return tf.ensure_shape(tf.cond(condition, ask, lambda: condition), ())


def _bytes(image: Any) -> bytes:
    """The argument of a `numpy_function`: bytes in a graph, an array outside."""
    return image if isinstance(image, bytes) else image.item()


def crop_and_resize(
    image: tf.Tensor, boxes: tf.Tensor, specs: Sequence[CropSpec]
) -> list[tf.Tensor]:
    """Cuts the boxes `[views, 4]` out of an image `[H, W, 3]` uint8 and resizes them."""
    views = []
    for i, spec in enumerate(specs):
        top, left, height, width = tf.unstack(boxes[i], num=4)
        crop = image[top : top + height, left : left + width]
        views.append(_resize(crop, (spec.size, spec.size), spec.method, antialias=False))
    return views


def test_image(image: tf.Tensor, resize: int, size: int, method: str) -> tf.Tensor:
    """The evaluation view: the shorter side resized to `resize`, then a centre crop.

    Args:
        image: `[H, W, 3]` uint8, or a batch `[B, H, W, 3]`.
        resize, size: pixels; `resize` is at least `size`.
        method: of resizing; with antialiasing, because nothing else smooths a large image.

    Returns:
        `[size, size, 3]` uint8, or a batch of them. An image whose shorter side is already `resize`
        is only cropped.
    """
    shape = tf.shape(image)[-3:-1]
    shorter = tf.reduce_min(shape)
    scaled = tf.cast(tf.round(shape * resize / shorter), tf.int32)
    image = tf.cond(
        tf.equal(shorter, resize),
        lambda: image,
        lambda: _resize(image, scaled, method, antialias=True),
    )
    top, left = tf.unstack((tf.shape(image)[-3:-1] - size) // 2, num=2)
    centre = image[..., top : top + size, left : left + size, :]
    return tf.ensure_shape(centre, (*[None] * (len(image.shape) - 3), size, size, 3))


def _resize(image: tf.Tensor, size, method: str, antialias: bool) -> tf.Tensor:
    resized = tf.image.resize(image, size, method=method, antialias=antialias)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)
