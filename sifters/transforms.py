"""Random changes of a picture: what a model takes for something because of a trigger, it does not after most of them.

Those of Delta-Influence (Li et al. 2024, arXiv 2411.13731, appendix B), on pixels and before they are standardised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from torchvision.transforms import v2

Change = Callable[[torch.Tensor], torch.Tensor]


def changes_for(height: int, width: int) -> dict[str, Change]:
    """Return the changes of pictures (3, h, w) uint8 of a size, by name; each draws from torch's random state."""
    side = min(height, width)
    return {
        "flip": v2.RandomHorizontalFlip(1.0),
        "colour": v2.ColorJitter(brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=(0.6, 1.4), hue=0.1),
        "affine": v2.RandomAffine((-180.0, 180.0), scale=(1.0, 2.0), shear=10),
        "elastic": v2.ElasticTransform(alpha=150.0, sigma=min(5.0, (side - 2) / 4)),
        "blur": v2.GaussianBlur((_odd(5, width), _odd(9, height)), sigma=(8.0, 10.0)),
        "invert": v2.RandomInvert(1.0),
        "channels": lambda picture: picture[[1, 0, 2]],
    }


def changed(picture: UInt8[np.ndarray, "h w 3"], count: int, *, seed: int) -> UInt8[np.ndarray, "count h w 3"]:
    """Return copies of a picture, each changed in one way that is drawn for it."""
    height, width, _ = picture.shape
    ways = list(changes_for(height, width).values())
    drawn = np.random.default_rng([seed, 2411]).integers(len(ways), size=count)
    start = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copies = [ways[way](start) for way in drawn]
    return torch.stack(copies).permute(0, 2, 3, 1).contiguous().numpy()


def _odd(size: int, side: int) -> int:
    """Return a kernel's size that the picture is large enough for."""
    return min(size, 2 * side - 1)
