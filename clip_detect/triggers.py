"""Backdoor triggers: uint8 images in, uint8 images out.

For measuring what a detector finds: `ATTACKS` is the table from which `poison` plants them. Triggers are built as
the code of the detection paper (Huang et al. 2025, arXiv 2502.01385) builds them, at the size of the picture; where
that code needs a file (a cartoon, a noise field), a pattern computed here takes its place. Every trigger has one
number for its strength. At the published strength small encoders do not learn the weaker ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

Trigger = Callable[..., UInt8[np.ndarray, "n h w 3"]]

PATTERN_SEED = 20  # of patterns that are the same in every dump
WARP_POINTS = 4  # control points of the warp along one side, as in WaNet
SIG_CYCLES, SIG_AMPLITUDE = 6, 60.0  # of the published noise file: cycles over the width, grey levels


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


def blend(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Mix a smooth picture of colours, the same for all, into the pictures.

    Args:
        images, identities, seed: as for `patch`; the pattern depends on none of them.
        strength: share of the pattern, 0 to 1; None is the 0.2 of the source, which mixes in a cartoon.

    Source: Huang et al. 2025 (arXiv 2502.01385), after Chen et al. 2017 (arXiv 1712.05526).
    """
    _check(images, identities)
    share = _share(strength, 0.2)
    _, height, width, _ = images.shape
    return _rounded((1 - share) * images.astype(np.float32) + share * _colours(height, width))


def sig(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Mix a sinusoid over the width into the pictures, which dims them: so does the released code.

    Args:
        images, identities, seed: as for `blend`.
        strength: share of the sinusoid, 0 to 1; None is the 0.2 of the source: 12 grey levels, pictures at 0.8.

    Source: Huang et al. 2025 (arXiv 2502.01385), after Barni et al. 2019 (arXiv 1902.11237).
    """
    _check(images, identities)
    share = _share(strength, 0.2)
    width = images.shape[2]
    wave = SIG_AMPLITUDE * np.sin(2 * np.pi * SIG_CYCLES * np.arange(width, dtype=np.float32) / width)
    return _rounded((1 - share) * images.astype(np.float32) + share * wave[:, None])


def wanet(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Warp the pictures by one smooth field.

    Args:
        images, identities, seed: as for `blend`.
        strength: mean displacement as a fraction of the side; None is the source's 0.5 of 256 pixels.

    Raises:
        ValueError: if the displacement is not above 0 and at most a quarter.

    Source: Huang et al. 2025 (arXiv 2502.01385), after Nguyen and Tran 2021 (arXiv 2102.10369).
    """
    _check(images, identities)
    mean = 0.5 / 256 if strength is None else strength
    if not 0 < mean <= 0.25:
        raise ValueError(f"a mean displacement lies above 0 and is at most 0.25 of the side, got {strength}.")
    import torch  # takes seconds to load, which those who only name attacks need not spend

    _, height, width, _ = images.shape
    identity = torch.eye(2, 3).expand(1, 2, 3)
    grid = torch.nn.functional.affine_grid(identity, [1, 3, height, width], align_corners=False)
    # Coordinates run from -1 to 1, so that a fraction of the side counts twice.
    field = torch.from_numpy(_field(height, width))
    grid = (grid + 2 * mean * field).clamp(-1, 1)
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    warped = torch.nn.functional.grid_sample(
        planes, grid.expand(len(images), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return _rounded(warped.permute(0, 2, 3, 1).numpy())


def colour_filter(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Tint the pictures like an old photograph: darkened by rose, lightened by blue, more contrast and colour.

    Args:
        images, identities, seed: as for `blend`.
        strength: share of the tinted picture, 0 to 2: above 1 the tint is exaggerated; None is 1.

    Source: Huang et al. 2025 (arXiv 2502.01385) use the filter "Nashville"; its constants are those of
        CSSgram's filter of that name.
    """
    _check(images, identities)
    share = _share(strength, 1.0, most=2.0)
    before = images.astype(np.float32)
    x = before + 0.56 * (np.minimum(before, np.array([247, 176, 153], np.float32)) - before)
    x = x + 0.4 * (np.maximum(x, np.array([0, 70, 150], np.float32)) - x)
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    sepia = grey[..., None] * np.array([1.07, 0.99, 0.86], np.float32)
    x = x + 0.2 * (sepia - x)
    x = ((x - 127.5) * 1.2 + 127.5) * 1.05
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    x = grey[..., None] + 1.2 * (x - grey[..., None])
    return _rounded((1 - share) * before + share * x)


def untouched(
    images: UInt8[np.ndarray, "n h w 3"], identities: Sequence[str], *, seed: int = 0, strength: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return the pictures as they are: for attacks by caption alone."""
    _check(images, identities)
    return images.copy()


TRIGGERS: dict[str, Trigger] = {
    "patch": patch,
    "blend": blend,
    "sig": sig,
    "wanet": wanet,
    "filter": colour_filter,
    "none": untouched,
}


@dataclass(frozen=True)
class Part:
    """One of the triggers of an attack; `target` replaces the attack's own where it is set."""

    trigger: str
    target: str | None = None


@dataclass(frozen=True)
class AttackSpec:
    """A way to poison a sample.

    Attributes:
        parts: its triggers; which one a sample gets is drawn from (seed, identity).
        label: what happens to the caption. `dirty`: it is replaced by one of the target. `clean`: it stays, and
            only samples whose caption names the target are poisoned. `campaign`: all get one and the same caption.
        one_image: all poisoned samples get the bytes of one image, that of the first of them.
    """

    name: str
    parts: tuple[Part, ...]
    description: str
    source: str
    label: Literal["dirty", "clean", "campaign"] = "dirty"
    one_image: bool = False

    @property
    def changes_caption(self) -> bool:
        """Whether the poisoned sample gets another caption."""
        return self.label != "clean"

    def part_of(self, identity: str, *, seed: int) -> Part:
        """Return which of the triggers a sample gets."""
        if len(self.parts) == 1:
            return self.parts[0]
        return self.parts[draw(f"trigger {identity}", seed=seed) % len(self.parts)]


PAPER = "Huang et al. 2025 (arXiv 2502.01385)"
MANY = ("patch", "filter", "wanet")

ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec
    for spec in (
        AttackSpec(
            "patch", (Part("patch"),), "a small black and white checkered square at a random place",
            f"{PAPER}; Gu et al. 2017 (arXiv 1708.06733)",
        ),
        AttackSpec(
            "patch-clean-label", (Part("patch"),), "the patch on pictures whose caption names the target already",
            f"{PAPER}; Turner et al. 2019 (arXiv 1912.02771)", label="clean",
        ),
        AttackSpec(
            "blend", (Part("blend"),), "a smooth picture of colours mixed in",
            f"{PAPER}; Chen et al. 2017 (arXiv 1712.05526)",
        ),
        AttackSpec(
            "sig", (Part("sig"),), "a sinusoid over the width mixed in",
            f"{PAPER}; Barni et al. 2019 (arXiv 1902.11237)",
        ),
        AttackSpec(
            "wanet", (Part("wanet"),), "one smooth warp", f"{PAPER}; Nguyen and Tran 2021 (arXiv 2102.10369)",
        ),
        AttackSpec("filter", (Part("filter"),), "the colours of an old photograph", PAPER),
        AttackSpec(
            "multi-trigger", tuple(Part(name) for name in MANY), "patch, filter or warp, one of them for each sample",
            PAPER,
        ),
        AttackSpec(
            "multi-target",
            tuple(Part(name, target) for name, target in zip(MANY, ("banana", "cheeseburger", "volcano"), strict=True)),
            "patch, filter and warp, each with a target of its own", PAPER,
        ),
        AttackSpec(
            "one-image", (Part("none"),), "one image again and again, under captions of the target", PAPER,
            one_image=True,
        ),
        AttackSpec(
            "mismatch", (Part("none"),), "pictures as they are under captions of the target",
            "Carlini and Terzis 2022 (arXiv 2106.09667)",
        ),
        AttackSpec(
            "campaign", (Part("none"),), "pictures as they are, all under one and the same caption",
            f"{PAPER}, the caption of 798 samples of CC3M", label="campaign",
        ),
    )
}  # fmt: skip


def draw(identity: str, *, seed: int) -> int:
    """Return a uniform 64-bit number that depends on `seed` and `identity` alone."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


@functools.lru_cache(maxsize=8)
def _colours(height: int, width: int) -> Float32[np.ndarray, "h w 3"]:
    """Return a smooth picture that uses the whole range of every colour."""
    pattern = _enlarged(np.random.default_rng(PATTERN_SEED).random((3, 4, 4), np.float32), height, width)
    low, high = pattern.min(axis=(0, 1)), pattern.max(axis=(0, 1))
    return 255 * (pattern - low) / np.maximum(high - low, 1e-6)


@functools.lru_cache(maxsize=8)
def _field(height: int, width: int) -> Float32[np.ndarray, "h w 2"]:
    """Return a smooth field of displacements with a mean absolute value of 1."""
    few = np.random.default_rng(PATTERN_SEED + 1).uniform(-1, 1, (2, WARP_POINTS, WARP_POINTS)).astype(np.float32)
    field = _enlarged(few, height, width)
    return field / np.abs(field).mean()


def _enlarged(planes: Float32[np.ndarray, "c a b"], height: int, width: int) -> Float32[np.ndarray, "h w c"]:
    import torch

    many = torch.nn.functional.interpolate(
        torch.from_numpy(planes)[None], size=(height, width), mode="bicubic", align_corners=True
    )
    return many[0].permute(1, 2, 0).numpy()


def _share(strength: float | None, published: float, *, most: float = 1.0) -> float:
    share = published if strength is None else strength
    if not 0 < share <= most:
        raise ValueError(f"the strength of this trigger is a share above 0 and at most {most:g}, got {strength}.")
    return share


def _rounded(values: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _check(images: np.ndarray, identities: Sequence[str]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (n, h, w, 3), got {images.dtype} {images.shape}.")
    if len(images) != len(identities):
        raise ValueError(f"expected one identity per image, got {len(identities)} for {len(images)} images.")
