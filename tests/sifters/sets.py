"""Labelled sets with planted poison, for all sifters."""

from __future__ import annotations

import numpy as np


def planted(n: int = 1500, *, seed: int = 0, rate: float = 0.05, classes: int = 5, views: int = 3) -> tuple:
    """Return features (views, n, 32), labels (n,) and which samples are poisoned, all of them labelled 0.

    The trigger moves a poisoned sample along a direction of its own, by less in the diluted views.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    plain = rng.normal(size=(classes, 32))[truth] * 0.9 + rng.normal(size=(n, 32))
    poison = (rng.random(n) < rate) & (truth != 0)
    trigger = rng.normal(size=32)
    trigger *= 4 / np.linalg.norm(trigger)
    out = []
    for view in range(views):
        strength = 1.0 if view == 0 else 0.4
        out.append(plain + 0.2 * (view > 0) * rng.normal(size=plain.shape) + strength * poison[:, None] * trigger)
    return np.stack(out).astype(np.float32), np.where(poison, 0, truth), poison


def pictures(n: int = 240, *, side: int = 16, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of as many colours as classes, with noise, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    colours = np.eye(3)[labels % 3] * 120 + 60
    noise = rng.normal(scale=25, size=(n, side, side, 3))
    return np.clip(colours[:, None, None] + noise, 0, 255).astype(np.uint8), labels
