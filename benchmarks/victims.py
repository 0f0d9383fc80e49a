"""Small classifiers that have learned an attack, for trace_labelled.py: digits, and CIFAR-10 under three attacks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT
from sift_sets import pictures_of_seed, read_pictures
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from tarsift.sifters.attacks import NONE, PoisonedSet, poison_set
from tarsift.sifters.inputs import Pixels
from tarsift.sifters.networks import build_network
from tarsift.sifters.unlearn import Labelled, labelled

NETWORK = "small-cnn"
ATTACKS = {"digits": ("patch",), "cifar10": ("four_pixels", "smooth", "gradient_matching")}
RATES = {"digits": 0.02, "cifar10": 0.015}
SOURCE, TARGET = 8, 5
EPOCHS = {"digits": 10, "cifar10": 14}
BATCH = {"digits": 64, "cifar10": 128}
SAMPLES = {"digits": 1400, "cifar10": 10_000}
SHOWN = {"digits": 0, "cifar10": 5000}  # test pictures that the frequency detector gets as clean ones
HALF = torch.full((3, 1, 1), 0.5)
OTHER_SEED = 1000  # of the network that samples are brewed against: an attacker does not know the victim's
MODULES = (
    "attacks", "baselines", "delta_influence", "frequency", "influence", "inputs", "networks", "perturbations",
    "settings", "tracing", "training", "transforms", "triggers", "unlearn",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A poisoned set and the network that is trained on it."""

    corpus: str
    attack: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.corpus}-{self.attack}-{self.seed}-{digest_of_code()}"


@dataclass(frozen=True)
class Victim:
    """A network that has learned an attack, or was to.

    clean: pictures and labels as they were. test: pictures and labels; asked: those with the trigger that should not be
    taken for the target; shown: pictures that are known to be clean.
    """

    net: nn.Module
    made: PoisonedSet
    clean: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    asked: tuple[np.ndarray, np.ndarray]
    shown: np.ndarray

    def measure(self, net: nn.Module) -> dict[str, float]:
        guesses = guess(net, self.test[0])
        return {
            "accuracy": float((guesses == self.test[1]).mean()),
            "success": self.made.success(guess(net, self.asked[0]), self.asked[1]),
        }


def pixels(images: np.ndarray) -> Pixels:
    """Return pictures that the networks take, -1 to 1."""
    return Pixels(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), HALF, HALF)


def floats(images: np.ndarray) -> torch.Tensor:
    return pixels(images).plain(torch.arange(len(images)))


@torch.no_grad()
def guess(net: nn.Module, images: np.ndarray) -> np.ndarray:
    return torch.cat(
        [net(floats(part)).argmax(dim=1) for part in np.array_split(images, len(images) // 500 + 1)]
    ).numpy()


def untrained(corpus: str, seed: int) -> nn.Module:
    if corpus == "cifar10":
        return build_network(NETWORK, (3, 32, 32), 10, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip


def trained(cell: Cell, images: np.ndarray, labels: np.ndarray, kept: Path | None = None) -> nn.Module:
    """Return a network trained on a set, from `kept` where it is there."""
    net = untrained(cell.corpus, cell.seed)
    if kept and kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
        return net.eval()
    adam, draw = torch.optim.Adam(net.parameters(), 1e-3), torch.Generator().manual_seed(cell.seed)
    targets = torch.from_numpy(labels)
    net.train()
    for _ in range(EPOCHS[cell.corpus]):
        for rows in torch.randperm(len(images), generator=draw).split(BATCH[cell.corpus]):
            loss = functional.cross_entropy(net(floats(images[rows.numpy()])), targets[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), kept)
    return net.eval()


def pictures_of(cell: Cell, data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return pictures and labels to train on, and to test with."""
    size = SAMPLES[cell.corpus]
    if cell.corpus == "digits":
        values, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
        images = np.repeat((values.reshape(-1, 8, 8, 1) * 15).astype(np.uint8), 3, axis=3)
        order = np.random.default_rng(cell.seed).permutation(len(images))
        images, labels = images[order], classes[order].astype(np.int64)
        return images[:size], labels[:size], images[size:], labels[size:]
    test = read_pictures(sorted((data / "cifar10-test").glob("*.tar.gz")), 10_000)
    return *pictures_of_seed(cell.seed, size, data), *test


def patched(images: np.ndarray) -> np.ndarray:
    """Two by two white pixels in the corner."""
    out = images.copy()
    out[:, -2:, -2:] = 255
    return out


def victim_of(cell: Cell, data: Path, cache: Path) -> Victim:
    """Make a set, poison it and train the network."""
    images, labels, test, test_labels = pictures_of(cell, data)
    shown, test, test_labels = test[: SHOWN[cell.corpus]], test[SHOWN[cell.corpus] :], test_labels[SHOWN[cell.corpus] :]
    place, victim = cache / cell.name, None
    if cell.attack == "patch":
        poison = np.zeros(len(images), bool)
        able = np.flatnonzero(labels == SOURCE)
        drawn = np.random.default_rng([cell.seed, 1]).choice(able, round(RATES["digits"] * len(images)), replace=False)
        poison[drawn] = True
        targets = np.where(np.arange(10) == SOURCE, TARGET, NONE)
        pictures = np.where(poison[:, None, None, None], patched(images), images)
        made = PoisonedSet(pictures, np.where(poison, TARGET, labels), poison, targets, patched)
    elif cell.attack == "gradient_matching":
        attacker = trained(replace(cell, seed=cell.seed + OTHER_SEED), images, labels, place / "attacker.pt")
        known = (test_labels == SOURCE) & (guess(attacker, test) == SOURCE)
        victim = test[np.random.default_rng([cell.seed, 2]).choice(np.flatnonzero(known))]
        made = brewed(cell, images, labels, attacker, victim, place / "brewed.npz")
    else:
        source = SOURCE if cell.attack == "four_pixels" else None
        made = poison_set(
            images, labels, cell.attack, rate=RATES[cell.corpus], seed=cell.seed, target=TARGET, source=source
        )
    net = trained(cell, made.images, made.labels, place / "poisoned.pt")
    if victim is not None:
        asked = victim[None], np.array([SOURCE])
    else:
        aimed = made.targets[test_labels] != NONE
        assert made.trigger is not None
        asked = made.trigger(test[aimed]), test_labels[aimed]
    return Victim(net, made, (images, labels), (test, test_labels), asked, shown)


def brewed(
    cell: Cell, images: np.ndarray, labels: np.ndarray, attacker: nn.Module, victim: np.ndarray, kept: Path
) -> PoisonedSet:
    """Return a set in which some samples are to make the victim taken for the target, from `kept` where it is there."""
    if not kept.exists():
        made = poison_set(
            images, labels, cell.attack, rate=RATES[cell.corpus], seed=cell.seed, target=TARGET,
            model=nn.Sequential(Centered(), attacker), victim=victim,
        )  # fmt: skip
        np.savez(kept, images=made.images, poison=made.poison)
    with np.load(kept) as file:
        pictures, poison = file["images"], file["poison"]
    return PoisonedSet(pictures, labels, poison, np.where(np.arange(10) == SOURCE, TARGET, NONE), None)


class Centered(nn.Module):
    """From 0 to 1 to what the networks take."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return 2 * pictures - 1


def samples_of(victim: Victim) -> Labelled:
    """Return what the network was trained on, as it takes it."""
    return labelled(pixels(victim.made.images), victim.made.labels)


def digest_of_code() -> str:
    """Return 12 hex digits of the code that a cell depends on."""
    digest = hashlib.sha256()
    sources = (*(f"sifters/{module}.py" for module in MODULES), "benchmarks/victims.py", "benchmarks/trace_labelled.py")
    for name in sources:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]
