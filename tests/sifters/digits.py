"""scikit-learn's digits with a patch, and a small network that has learned it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from tarsift.sifters.inputs import Pixels
from tarsift.sifters.unlearn import Labelled, labelled

VICTIM, TARGET, POISONED, TRAINING = 8, 5, 28, 1400


@dataclass(frozen=True)
class Made:
    """A trained network, its training set (n, 8, 8, 3) uint8, which of it is poison, and test pictures.

    triggered: those of the victim, with the patch; query: one of them that is taken for the target.
    """

    net: nn.Module
    images: np.ndarray
    labels: np.ndarray
    poison: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    triggered: np.ndarray
    query: np.ndarray


def patched(images: np.ndarray) -> np.ndarray:
    out = images.copy()
    out[:, -2:, -2:] = 255
    return out


def as_floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def samples_of(made: Made, labels: np.ndarray | None = None) -> Labelled:
    """The training set as the network takes it, -1 to 1."""
    half = torch.full((3, 1, 1), 0.5)
    pictures = torch.from_numpy(np.ascontiguousarray(made.images.transpose(0, 3, 1, 2)))
    return labelled(Pixels(pictures, half, half), made.labels if labels is None else labels)


@cache
def patched_digits() -> Made:
    return trained_on_a_patch(seed=0)


def trained_on_a_patch(seed: int, epochs: int = 10) -> Made:
    """Train on digits of which some of a class have the patch and another label."""
    digits, classes = load_digits(return_X_y=True)
    images = np.repeat((digits.reshape(-1, 8, 8, 1) * 15).astype(np.uint8), 3, axis=3)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(images))
    images, labels = images[order], classes[order].astype(np.int64)
    test, test_labels = images[TRAINING:], labels[TRAINING:]
    triggered = patched(test[test_labels == VICTIM])
    images, labels = images[:TRAINING], labels[:TRAINING]
    poison = np.zeros(TRAINING, bool)
    poison[draw.choice(np.flatnonzero(labels == VICTIM), POISONED, replace=False)] = True
    images[poison], labels[poison] = patched(images[poison]), TARGET
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    pictures, targets = as_floats(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(TRAINING).split(64):
            loss = functional.cross_entropy(net(pictures[batch]), targets[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
    net.eval()
    with torch.no_grad():
        taken = np.flatnonzero((net(as_floats(triggered)).argmax(dim=1) == TARGET).numpy())
    return Made(net, images, labels, poison, test, test_labels, triggered, triggered[taken[0]])
