"""What a sifter looks at: pictures or frozen features, as batches on a device, plain, augmented or diluted.

*Dilution* perturbs a sample at random before it is judged: what a network has learned of a trigger does not survive
it as well as what it has learned of a class (Meta-Sift, section 3.3). Pictures are diluted on the device, a batch at
a time. Features cannot be diluted afterwards: their dilution is a choice among views of the picture, encoded apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    def plain(self, rows: Int64[torch.Tensor, " b"]) -> Float32[torch.Tensor, "b 3 h w"]:
        return (self.pictures[rows].float() / 255 - self.mean) / self.std

    def augmented(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b 3 h w"]:
        return warp(self.plain(rows), draw, rotate=0.0)

    def diluted(self, rows: Int64[torch.Tensor, " b"], draw: torch.Generator) -> Float32[torch.Tensor, "b 3 h w"]:
        return blur(warp(self.plain(rows), draw, rotate=ROTATE_DEGREES), draw)


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


def warp(
    batch: Float32[torch.Tensor, "b 3 h w"], draw: torch.Generator, *, rotate: float
) -> Float32[torch.Tensor, "b 3 h w"]:
    """Mirror half of the pictures, shift each by up to an eighth of its side and turn it by up to `rotate` degrees.

    What comes in from outside is 0, the mean of standardised pictures. Without a rotation shifts are whole pixels.
    """
    count, _, height, width = batch.shape
    device = batch.device
    mirror = torch.where(torch.rand(count, generator=draw, device=device) < 0.5, -1.0, 1.0)
    angle = (torch.rand(count, generator=draw, device=device) * 2 - 1) * math.radians(rotate)
    shift = []
    for side in (width, height):
        most = max(1, side // CROP_PIXELS_OF)
        shift.append(torch.randint(-most, most + 1, (count,), generator=draw, device=device) * (2 / side))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    slant = height / width
    first = torch.stack([cosine * mirror, -sine * slant, shift[0]], dim=1)
    second = torch.stack([sine * mirror / slant, cosine, shift[1]], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(batch.shape), align_corners=False)
    mode = "bilinear" if rotate else "nearest"
    return functional.grid_sample(batch, grid, mode=mode, padding_mode="zeros", align_corners=False)


def blur(batch: Float32[torch.Tensor, "b 3 h w"], draw: torch.Generator) -> Float32[torch.Tensor, "b 3 h w"]:
    """Smooth each picture with a Gaussian kernel of 3 x 3 pixels of its own width."""
    low, high = BLUR_SIGMA
    sigma = low + (high - low) * torch.rand(len(batch), generator=draw, device=batch.device)
    side = torch.exp(-0.5 / sigma**2)
    kernel = torch.stack([side, torch.ones_like(side), side], dim=1)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    count, channels, height, width = batch.shape
    flat = functional.pad(batch, (1, 1, 1, 1), mode="reflect").reshape(1, count * channels, height + 2, width + 2)
    each = kernel.repeat_interleave(channels, dim=0)
    flat = functional.conv2d(flat, each[:, None, :, None], groups=count * channels)
    flat = functional.conv2d(flat, each[:, None, None, :], groups=count * channels)
    return flat.reshape(batch.shape)


def _choice(
    views: int, first: int, rows: Int64[torch.Tensor, " b"], draw: torch.Generator
) -> Int64[torch.Tensor, " b"]:
    return torch.randint(first, views, rows.shape, generator=draw, device=rows.device)
