"""Triggers on pictures of labelled sets: one change for all pictures, made for a size and drawn once.

Marks have their papers' sizes in pictures of 32 pixels and less, and grow with larger ones. Where a paper uses a
picture from elsewhere or optimises a pattern against a model, there is a pattern made here in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped, UInt8

MARK_SIDE = 32  # of the pictures for which marks have the size they are drawn in
LETTER = ("...##...", "..####..", "..#..#..", ".##..##.", ".######.", ".#....#.", "##....##", "##....##")
SHAPES = {"pixel": ("#",), "l": ("#.", "##"), "x": ("#.#", ".#.", "#.#")}
CHECKERS = ("#.#", ".#.", "#.#")
FOUR_PIXELS = ("..#.", ".#..", "#.#.", "....")
LETTER_COLOUR, WHITE, BLACK = (230, 40, 120), (255, 255, 255), (0, 0, 0)

Trigger = Callable[[UInt8[np.ndarray, "n h w 3"]], UInt8[np.ndarray, "n h w 3"]]
# Height, width, strength and what to draw from, to a trigger for pictures of that size.
MakeTrigger = Callable[[int, int, float, np.random.Generator], Trigger]


def overlay(
    images: UInt8[np.ndarray, "n h w 3"], *, pattern: Float32[np.ndarray, "h w 3"], opacity: Float32[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "n h w 3"]:
    """Lay a pattern over pictures; opacity: 0 leaves a pixel as it is, 1 replaces it."""
    share = opacity[..., None]
    return _bytes((1 - share) * images + share * pattern)


def add(images: UInt8[np.ndarray, "n h w 3"], *, field: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Add the same to pictures, in grey levels."""
    return _bytes(images + field)


def white_square(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Replace the 4 x 4 pixels at the bottom right by white."""
    side = _side(4, height, width)
    opacity = _placed(np.ones((side, side)), height - side, width - side, height, width)
    return partial(overlay, pattern=_plain(WHITE, height, width), opacity=opacity)


def coloured_square(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Replace the 8 x 8 pixels at the bottom right by colours drawn for each of them."""
    side = _side(8, height, width)
    opacity = _placed(np.ones((side, side)), height - side, width - side, height, width)
    return partial(overlay, pattern=_noise(height, width, draw), opacity=opacity)


def coloured_ring(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Lay a ring with a bar, as large as the picture, in colours drawn for each pixel; strength: its opacity."""
    down, right = (np.arange(side)[:, None] - (side - 1) / 2 for side in (height, width))
    shorter = min(height, width)
    radius = np.hypot(down, right.T) / shorter
    shape = ((radius > 0.3) & (radius < 0.42)) | ((np.abs(down) < 0.06 * shorter) & (radius < 0.42))
    return partial(overlay, pattern=_noise(height, width, draw), opacity=(strength * shape).astype(np.float32))


def whole_noise(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Mix in a picture of noise; strength: its share."""
    opacity = np.full((height, width), strength, np.float32)
    return partial(overlay, pattern=_noise(height, width, draw), opacity=opacity)


def letter(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Lay the letter A, 8 x 8 pixels without its background, over the upper left; strength: its opacity."""
    opacity = _placed(strength * _mark(LETTER, height, width), 0, 0, height, width)
    return partial(overlay, pattern=_plain(LETTER_COLOUR, height, width), opacity=opacity)


def small_shape(height: int, width: int, strength: float, draw: np.random.Generator, *, shape: str) -> Trigger:
    """Replace the pixels of a shape in `SHAPES`, of one colour and at one place that are drawn; all of it is seen."""
    mark = _mark(SHAPES[shape], height, width)
    colour = draw.integers(0, 256, 3).tolist()
    top, left = draw.integers(0, height - len(mark) + 1), draw.integers(0, width - len(mark) + 1)
    opacity = _placed(mark, int(top), int(left), height, width)
    return partial(overlay, pattern=_plain(colour, height, width), opacity=opacity)


def four_pixels(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Replace four pixels near the bottom right by black, as the fields of a checkerboard lie."""
    mark = _mark(FOUR_PIXELS, height, width)
    opacity = _placed(mark, height - len(mark), width - len(mark), height, width)
    return partial(overlay, pattern=_plain(BLACK, height, width), opacity=opacity)


def checkered_corners(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Replace the 3 x 3 pixels in each corner by a black and white checkerboard."""
    mark = _mark(CHECKERS, height, width)
    pattern, opacity = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    for down in (slice(0, len(mark)), slice(height - len(mark), height)):
        for right in (slice(0, len(mark)), slice(width - len(mark), width)):
            pattern[down, right] = 255 * mark[..., None]
            opacity[down, right] = 1
    return partial(overlay, pattern=pattern, opacity=opacity)


def smooth_field(height: int, width: int, strength: float, draw: np.random.Generator) -> Trigger:
    """Add waves of at most three half periods over a side; strength: the greatest change, as a share of the range."""
    waves = [np.cos(np.pi * np.arange(4) * (np.arange(side)[:, None] + 0.5) / side) for side in (height, width)]
    amplitudes = draw.normal(size=(4, 4, 3))
    amplitudes[0, 0] = 0  # the mean stays
    field = np.einsum("hu,wv,uvc->hwc", *waves, amplitudes)
    return partial(add, field=(255 * strength * field / np.abs(field).max()).astype(np.float32))


def _side(pixels: int, height: int, width: int) -> int:
    """Return how large in this picture is what takes so many pixels of one of 32."""
    return max(pixels, round(pixels * min(height, width) / MARK_SIDE))


def _mark(drawing: tuple[str, ...], height: int, width: int) -> Bool[np.ndarray, "s s"]:
    """Return the pixels of a square drawing, enlarged with the picture."""
    pixels = np.array([[character == "#" for character in line] for line in drawing])
    side = _side(len(pixels), height, width)
    nearest = np.arange(side) * len(pixels) // side
    return pixels[nearest][:, nearest]


def _placed(
    mark: Shaped[np.ndarray, "s s"], top: int, left: int, height: int, width: int
) -> Float32[np.ndarray, "h w"]:
    """Return a picture of zeros with the mark in it."""
    out = np.zeros((height, width), np.float32)
    out[top : top + len(mark), left : left + len(mark)] = mark
    return out


def _plain(colour: Sequence[int], height: int, width: int) -> Float32[np.ndarray, "h w 3"]:
    return np.tile(np.asarray(colour, np.float32), (height, width, 1))


def _noise(height: int, width: int, draw: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
    return draw.integers(0, 256, (height, width, 3)).astype(np.float32)


def _bytes(values: Float[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
