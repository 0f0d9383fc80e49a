"""What a sifter looks at: pictures or frozen features, as batches on a device, plain, augmented or diluted.

*Dilution* perturbs a sample at random before it is judged: what a network has learned of a trigger does not survive
it as well as what it has learned of a class (Meta-Sift, section 3.3). Pictures are diluted on the device, a batch at
a time. Features cannot be diluted afterwards: their dilution is a choice among views of the picture, encoded apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch.nn import functional

CROP_PIXELS_OF = 8  # a picture is padded by this part of its side before it is cropped: 4 pixels of 32
ROTATE_DEGREES = 25.0
BLUR_SIGMA = (0.1, 2.0)  # drawn evenly between; kernel of three pixels


class Inputs(Protocol):
    """Samples of one problem on one device; `rows` may have any shape, a batch has the sample's shape behind it."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as a network gets it."""
        ...

    @property
    def device(self) -> torch.device: ...

    def plain(self, rows: Int64[torch.Tensor, " b"]) -> Float32[torch.Tensor, "b ..."]:
        """Samples as they are."""
        ...

    def augmented(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b ..."]:
        """Samples as one trains on them: mirrored and shifted at random."""
        ...

    def diluted(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b ..."]:
        """Samples perturbed at random, as they are judged."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Pictures as bytes on a device; batches are standardised to mean 0 and deviation 1 per channel."""

    pictures: UInt8[torch.Tensor, "n 3 h w"]
    mean: Float32[torch.Tensor, "3 1 1"]
    std: Float32[torch.Tensor, "3 1 1"]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pictures.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.pictures.device

    def like(self, images: UInt8[np.ndarray, "m h w 3"]) -> Pixels:
        """Return other pictures, standardised by the same moments."""
        pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return replace(self, pictures=pictures.to(self.device))

    def plain(self, rows: Int64[torch.Tensor, " b"]) -> Float32[torch.Tensor, "b 3 h w"]:
        return (self.pictures[rows].float() / 255 - self.mean) / self.std

    def augmented(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b 3 h w"]:
        return warp(self.plain(rows), self._perturbation(len(rows), draw).upright())

    def diluted(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b 3 h w"]:
        return perturb(self.plain(rows), self._perturbation(len(rows), draw))

    def _perturbation(self, count: int, draw: torch.Generator) -> Perturbation:
        height, width = self.shape[1:]
        return Perturbation.of(torch.rand(5, count, generator=draw, device=self.device), height, width)


@dataclass(frozen=True)
class Features:
    """Frozen features on a device: (views, n, d) float32, the plain picture's first, each view standardised by it."""

    views: Float32[torch.Tensor, "v n d"]

    def __len__(self) -> int:
        return self.views.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.views.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.views.device

    def plain(self, rows: Int64[torch.Tensor, " b"]) -> Float32[torch.Tensor, "b d"]:
        return self.views[0, rows]

    def augmented(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b d"]:
        return self.views[_choice(len(self.views), 0, rows, draw), rows]

    def diluted(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b d"]:
        return self.views[_choice(len(self.views), int(len(self.views) > 1), rows, draw), rows]


def as_inputs(
    images: UInt8[np.ndarray, "n h w 3"] | Float[np.ndarray, "n d"] | Float[np.ndarray, "v n d"],
    device: str | torch.device = "cpu",
) -> Inputs:
    """Put pictures, features, or several views of features (the plain one first) on a device.

    Raises:
        ValueError: another shape or type, or values that are not finite.
    """
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3:
        pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        mean, std = _moments(images)
        return Pixels(pictures.to(device), mean.to(device), std.to(device))
    if images.ndim in (2, 3) and np.issubdtype(images.dtype, np.floating):
        views = np.asarray(images if images.ndim == 3 else images[None], np.float64)
        if not np.isfinite(views).all():
            raise ValueError("`images` holds features that are not finite: leave those samples out.")
        center, spread = views[0].mean(axis=0), views[0].std(axis=0)
        standardised = (views - center) / np.where(spread > 0, spread, 1.0)
        return Features(torch.from_numpy(standardised.astype(np.float32)).to(device))
    raise ValueError(
        "`images` must be pictures, uint8 (n, height, width, 3), or features, float (n, d) or (views, n, d): "
        f"got {images.dtype} {images.shape}."
    )


def _moments(images: UInt8[np.ndarray, "n h w 3"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, 0 to 1, from its histogram: no copy of the pictures as floats."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    weights = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mean = weights @ values
    std = np.sqrt(np.maximum((weights @ values**2) - mean**2, 1e-4))
    mean, std = (torch.from_numpy(moment.astype(np.float32)).view(3, 1, 1) for moment in (mean, std))
    return mean, std


@dataclass(frozen=True)
class Perturbation:
    """What is done to each picture of a batch, (b,) each.

    mirror: -1 where it is mirrored, else 1. angle: radians. right, down: whole pixels. sigma: of the blur, in pixels.
    """

    mirror: Float32[torch.Tensor, " b"]
    angle: Float32[torch.Tensor, " b"]
    right: Float32[torch.Tensor, " b"]
    down: Float32[torch.Tensor, " b"]
    sigma: Float32[torch.Tensor, " b"]

    @classmethod
    def of(cls, uniform: Float32[torch.Tensor, "5 b"], height: int, width: int) -> Perturbation:
        """Turn numbers drawn evenly from 0 to 1 into what is done.

        Half of the pictures are mirrored; each is shifted by up to an eighth of its side, turned by up to 25 degrees,
        and blurred.
        """
        shifts = []
        for drawn, side in ((uniform[2], width), (uniform[3], height)):
            most = max(1, side // CROP_PIXELS_OF)
            shifts.append((drawn * (2 * most + 1)).floor().clamp(max=2 * most) - most)
        low, high = BLUR_SIGMA
        return cls(
            mirror=torch.where(uniform[0] < 0.5, -1.0, 1.0),
            angle=(uniform[1] * 2 - 1) * math.radians(ROTATE_DEGREES),
            right=shifts[0],
            down=shifts[1],
            sigma=low + (high - low) * uniform[4],
        )

    def upright(self) -> Perturbation:
        """Return the same without a rotation."""
        return replace(self, angle=torch.zeros_like(self.angle))


def perturb(batch: Float32[torch.Tensor, "b 3 h w"], how: Perturbation) -> Float32[torch.Tensor, "b 3 h w"]:
    """Dilute pictures: mirror, shift, turn and blur them. A picture's bits do not depend on its company."""
    return blur(warp(batch, how), how.sigma)


def warp(batch: Float32[torch.Tensor, "b 3 h w"], how: Perturbation) -> Float32[torch.Tensor, "b 3 h w"]:
    """Mirror, shift and turn pictures. What comes in from outside is 0, the mean of standardised pictures."""
    _, _, height, width = batch.shape
    cosine, sine = torch.cos(how.angle), torch.sin(how.angle)
    slant = height / width
    first = torch.stack([cosine * how.mirror, -sine * slant, how.right * (2 / width)], dim=1)
    second = torch.stack([sine * how.mirror / slant, cosine, how.down * (2 / height)], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(batch.shape), align_corners=False)
    mode = "bilinear" if how.angle.any() else "nearest"  # whole pixels stay what they are
    return functional.grid_sample(batch, grid, mode=mode, padding_mode="zeros", align_corners=False)


def blur(
    batch: Float32[torch.Tensor, "b 3 h w"], sigma: Float32[torch.Tensor, " b"]
) -> Float32[torch.Tensor, "b 3 h w"]:
    """Smooth each picture with a Gaussian kernel of 3 x 3 pixels of its own width, mirrored at the border."""
    side = torch.exp(-0.5 / sigma**2)
    center, side = (weight.view(-1, 1, 1, 1) for weight in (1 / (1 + 2 * side), side / (1 + 2 * side)))
    padded = functional.pad(batch, (1, 1, 1, 1), mode="reflect")
    across = center * padded[..., 1:-1] + side * (padded[..., :-2] + padded[..., 2:])
    return center * across[..., 1:-1, :] + side * (across[..., :-2, :] + across[..., 2:, :])


def _choice(
    views: int, first: int, rows: Int64[torch.Tensor, " b"], draw: torch.Generator
) -> Int64[torch.Tensor, " b"]:
    return torch.randint(first, views, rows.shape, generator=draw, device=rows.device)
