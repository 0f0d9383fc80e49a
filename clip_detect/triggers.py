"""Backdoor triggers: uint8 images in, uint8 images out.

For measuring what a detector finds: `ATTACKS` is the table from which `poison` plants them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

Trigger = Callable[..., UInt8[np.ndarray, "n h w 3"]]


def patch(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Stamp a black square with white pixels at its even rows and columns at a random place.

    The place of each stamp is drawn from (`seed`, identity), uniform over all places at which the
    square fits, so that it depends neither on the order of samples nor on their neighbours.

    Args:
        images: the pictures; not changed.
        identities: one name per picture.
        seed: of the places.
        strength: side of the square as a fraction of the picture's shorter side. None is the 16 of
            224 pixels of the source, but at least 8 pixels: a smaller square is lost in a small
            picture's JPEG blocks.

    Raises:
        ValueError: if the square does not fit, or there is not one identity per picture.

    Source: Huang et al. 2025 (arXiv 2502.01385), after BadNets, Gu et al. 2017 (arXiv 1708.06733).
    """
    _check(images, identities)
    _, height, width, _ = images.shape
    shorter = min(height, width)
    side = max(8, round(shorter * 16 / 224)) if strength is None else round(shorter * strength)
    if not 1 <= side <= shorter:
        raise ValueError(
            f"a patch of {side} pixels does not fit pictures of {height} x {width}: "
            f"choose `strength` between {1 / shorter:.3g} and 1, got {strength}."
        )
    square = np.zeros((side, side, 3), np.uint8)
    square[::2, ::2] = 255
    out = images.copy()
    for i, identity in enumerate(identities):
        top = draw(f"top {identity}", seed=seed) % (height - side + 1)
        left = draw(f"left {identity}", seed=seed) % (width - side + 1)
        out[i, top : top + side, left : left + side] = square
    return out


@dataclass(frozen=True)
class AttackSpec:
    """A way to poison a sample.

    `function` takes (images, identities, *, seed, strength). `label` says what happens to the
    caption: `dirty`, it is replaced by one of the target; `clean`, it stays, and only samples
    whose caption names the target are poisoned.
    """

    name: str
    function: Trigger
    description: str
    source: str
    label: Literal["dirty", "clean"]

    @property
    def changes_caption(self) -> bool:
        """Whether the poisoned sample gets a caption of the target."""
        return self.label == "dirty"


ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec
    for spec in (
        AttackSpec(
            name="patch",
            function=patch,
            description="a small black and white checkered square at a random place",
            source="Huang et al. 2025 (arXiv 2502.01385); Gu et al. 2017 (arXiv 1708.06733)",
            label="dirty",
        ),
    )
}


def draw(identity: str, *, seed: int) -> int:
    """Return a uniform 64-bit number that depends on `seed` and `identity` alone."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def _check(images: np.ndarray, identities: Sequence[str]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (n, h, w, 3), got {images.dtype} {images.shape}.")
    if len(images) != len(identities):
        raise ValueError(f"expected one identity per image, got {len(identities)} for {len(images)} images.")
