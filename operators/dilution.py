"""Diluted views: copies of decoded images, perturbed at random, that sifters judge samples by.

What is done to an image follows from its pixels and the number of the view, so that it is the same in any batch and
on any machine.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tarsift.clip_detect.sampling import keyed_hash, resalt
from tarsift.sifters.inputs import Perturbation, perturb


def dilute(
    pictures: UInt8[np.ndarray, "n h w 3"], view: int, *, fill: tuple[float, float, float]
) -> UInt8[np.ndarray, "n h w 3"]:
    """Mirror, shift, turn and blur each picture at random; fill: the colour, 0 to 1, that comes in from outside."""
    count, height, width, _ = pictures.shape
    if not count:
        return pictures
    how = Perturbation.of(torch.from_numpy(_draws(pictures, view)), height, width)
    colour = torch.tensor(fill).view(3, 1, 1)
    batch = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 255 - colour
    out = (perturb(batch, how) + colour).clamp(0, 1) * 255
    return np.ascontiguousarray(out.round().to(torch.uint8).numpy().transpose(0, 2, 3, 1))


def _draws(pictures: UInt8[np.ndarray, "n h w 3"], view: int) -> Float32[np.ndarray, "5 n"]:
    """Return five numbers for each picture, spread evenly from 0 to 1."""
    content = keyed_hash(pictures.reshape(len(pictures), -1), b"", "dilution")  # read once; the draws come from it
    hashes = [resalt(content, f"{view} {i}") for i in range(5)]
    return (np.stack(hashes) / 2**64).astype(np.float32)
