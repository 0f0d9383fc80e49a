"""A detector of triggers by frequencies: smooth pictures have little in the high ones, and most triggers have much.

Zeng et al. 2021 (ICCV, arXiv 2104.03413): a small network on the cosine transform of pictures, trained to tell clean
ones from copies with changes that stand for triggers (a white block, a block of noise, noise everywhere, a shadow,
another picture mixed in). It knows nothing of labels, and takes pictures that are known to be clean. A baseline for
Delta-Influence, whose paper compares it (arXiv 2411.13731, section 5).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from scipy.fft import dctn
from torch import nn
from torch.nn import functional

EPOCHS, BATCH, RATE = 10, 256, 0.05
MIXED, NOISE = 0.3, 25.0  # share of the other picture; grey levels of noise everywhere
ROWS = 1024


def changed_as_by_triggers(
    images: UInt8[np.ndarray, "n h w 3"], draw: np.random.Generator
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return a copy of pictures, each changed in one of five ways."""
    n, height, width, _ = images.shape
    out = images.astype(np.float32)
    ways = draw.integers(5, size=n)
    for row, way in enumerate(ways):
        if way <= 1:
            down, right = draw.integers(2, max(3, height // 4 + 1)), draw.integers(2, max(3, width // 4 + 1))
            top, left = draw.integers(0, height - down + 1), draw.integers(0, width - right + 1)
            block = 255.0 if way == 0 else draw.uniform(0, 255, (down, right, 3))
            out[row, top : top + down, left : left + right] = block
        elif way == 2:
            out[row] += draw.normal(0, NOISE, out[row].shape)
        elif way == 3:
            edge = draw.integers(width // 4, 3 * width // 4 + 1)
            out[row, :, :edge] *= draw.uniform(0.3, 0.7)
        else:
            out[row] = (1 - MIXED) * out[row] + MIXED * images[draw.integers(n)]
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def spectra(images: UInt8[np.ndarray, "n h w 3"]) -> Float32[torch.Tensor, "n 3 h w"]:
    """Return the cosine transform of every channel, 0 to 1 pixels, orthonormal."""
    return torch.from_numpy(dctn(images.transpose(0, 3, 1, 2).astype(np.float32) / 255, axes=(2, 3), norm="ortho"))


class FrequencyDetector:
    """A network that tells clean pictures from changed ones.

    Args:
        clean: pictures known to be clean, of the size of those that are judged; 8 pixels and more.
    """

    def __init__(self, clean: UInt8[np.ndarray, "n h w 3"], *, seed: int = 0, epochs: int = EPOCHS) -> None:
        draw = np.random.default_rng([seed, 2104])
        pictures = np.concatenate([clean, changed_as_by_triggers(clean, draw)])
        targets = torch.arange(len(pictures)) // len(clean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = _network()
            steps = torch.optim.Adadelta(self.net.parameters(), lr=RATE, weight_decay=1e-4)
            for _ in range(epochs):
                for rows in torch.randperm(len(pictures)).split(BATCH):
                    loss = functional.cross_entropy(self.net(spectra(pictures[rows.numpy()])), targets[rows])
                    steps.zero_grad()
                    loss.backward()
                    steps.step()
        self.net.eval()

    @torch.no_grad()
    def score(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, " n"]:
        """Return how likely each picture is a changed one, 0 to 1."""
        parts = [
            self.net(spectra(images[start : start + ROWS])).softmax(dim=1)[:, 1]
            for start in range(0, len(images), ROWS)
        ]
        return torch.cat(parts).numpy() if parts else np.empty(0, np.float32)


def _network() -> nn.Module:
    """Return six convolutions with ELU, pooled and thinned out after every second one."""
    layers: list[nn.Module] = []
    before = 3
    for width, dropped in ((32, 0.2), (64, 0.3), (128, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ELU(), nn.BatchNorm2d(width)]
            before = width
        layers += [nn.MaxPool2d(2), nn.Dropout(dropped)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 2))
