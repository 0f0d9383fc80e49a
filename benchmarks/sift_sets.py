"""Poisoned sets of labelled pictures for sift_cell.py: CIFAR-10 under an attack, and the features of a witness.

A set is some of the training pictures, other ones for every seed. A *witness* is a network that was trained on as many
other pictures under their true labels; its features are frozen, of the plain pictures and of three diluted views.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ROOT
from PIL import Image
from torch import nn

from tarsift.sifters.attacks import ATTACKS, PoisonedSet, as_rate, ispl_partition, poison_set
from tarsift.sifters.inputs import as_inputs
from tarsift.sifters.settings import FitConfig, IsplConfig
from tarsift.sifters.training import LabelledSet

NETWORK = "tiny-cnn"  # on pictures: of sifters and witnesses
SAMPLES = 10_000
CAT, DOG = 3, 5  # source and target of Meta-Sift's attacks
DILUTED_VIEWS = 3
SHARDS_PER_SEED, SHARD_SAMPLES = 10, 1000
MODULES = (  # of sifters/, that a cell depends on
    "attacks", "baselines", "inputs", "ispl", "meta_sift", "networks", "perturbations", "result", "settings",
    "training", "triggers",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A poisoned set and what is done with it.

    Attributes:
        method: `meta_sift`, `ispl`, a name in BASELINES, or `none`: only the training at the end.
        share: of what the attack's `rate_of` says.
        witness_epochs: of the network whose features are sifted; 0: pictures are.
        adaptive: poison is spread over the sets into which ISPL takes apart the clean set.
        settings: of the method, as its config takes them.
        final_epochs: of the model that is trained on what is kept, and of those it is compared with; 0: none is.
    """

    method: str
    attack: str
    share: float
    seed: int
    samples: int = SAMPLES
    source: int = CAT
    target: int = DOG
    witness_epochs: int = 0
    adaptive: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    final_epochs: int = 0

    @property
    def needed(self) -> dict[str, Any]:
        """Return the classes that the attack must be told."""
        return {name: getattr(self, name) for name in ATTACKS[self.attack].needs}


def read_pictures(shards: list[Path], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pictures (m, 32, 32, 3) uint8 of shards and their classes (m,)."""
    pictures, labels = [], []
    for shard in shards:
        if len(labels) >= most:
            break
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content and member.name.endswith(".jpg"):
                    pictures.append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")))
                elif content and member.name.endswith(".cls"):
                    labels.append(int(content.read()))
    return np.stack(pictures[:most]), np.array(labels[:most], np.int64)


def training_set(cell: Cell, data: Path, *, other: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell's pictures and classes; other: as many that are not among them, for the witness."""
    behind = max(SHARDS_PER_SEED, -(-cell.samples // SHARD_SAMPLES)) if other else 0
    return pictures_of_seed(cell.seed, cell.samples, data, behind=behind)


def pictures_of_seed(seed: int, samples: int, data: Path, *, behind: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return training pictures of CIFAR-10 and their classes, other ones for every seed; behind: shards passed over.

    Up to 10,000 those of neighbouring seeds have none in common.
    """
    shards = sorted((data / "cifar10-train").glob("*.tar.gz"))
    first = seed * SHARDS_PER_SEED + behind
    return read_pictures([shards[(first + i) % len(shards)] for i in range(len(shards))], samples)


def labelled(images: np.ndarray, labels: np.ndarray, cell: Cell) -> LabelledSet:
    """Return a set that `NETWORK` is trained on."""
    return LabelledSet(images, labels, network=NETWORK, fit=FitConfig(), seed=cell.seed, device="cpu")


def victim(classes: int, seed: int) -> nn.Sequential:
    """Return the network that is trained on what is kept: it learns a trigger of a few pixels from a few hundred.

    Its last layer knows where in the picture something is. Networks that average over the picture, as `NETWORK` and
    `small-cnn` do, did not learn small shapes from as few, and there was nothing to defend against.
    """

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *block(3, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32), nn.MaxPool2d(2),
            *block(32, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, classes),
        )  # fmt: skip


def witness_of(cell: Cell, data: Path, cache: Path) -> nn.Module:
    """Return the network whose features are sifted, trained once and kept."""
    place = cache / f"witness-{code_digest()}-{cell.seed}-{cell.samples}-{cell.witness_epochs}.pt"
    images, labels = training_set(cell, data, other=True)
    given = labelled(images, labels, cell)
    learner = given.fresh()
    if place.exists():
        learner.net.load_state_dict(torch.load(place, weights_only=True))
    else:
        learner.fit(given.rows, epochs=cell.witness_epochs, draw=given.draw)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}.pt")
        torch.save(learner.net.state_dict(), temporary)
        temporary.replace(place)
    return learner.net.eval()


def shown(cell: Cell, images: np.ndarray, data: Path, cache: Path) -> np.ndarray:
    """Return what is sifted: the pictures, or features (views, n, d), the plain view first."""
    if not cell.witness_epochs:
        return images
    encode = nn.Sequential(*list(witness_of(cell, data, cache).children())[:-1])
    inputs, draw = as_inputs(images), torch.Generator().manual_seed(cell.seed)
    rows = torch.arange(len(inputs)).split(500)
    with torch.no_grad():
        views = [torch.cat([encode(inputs.plain(part)) for part in rows])]
        views += [torch.cat([encode(inputs.diluted(part, draw)) for part in rows]) for _ in range(DILUTED_VIEWS)]
    return torch.stack(views).numpy()


def poisoned(cell: Cell, data: Path, cache: Path) -> PoisonedSet:
    """Return the cell's set."""
    images, labels = training_set(cell, data)
    rate = as_rate(cell.attack, cell.share, labels, **cell.needed)
    strata = None
    if cell.adaptive:
        clean = shown(cell, images, data, cache)
        strata = ispl_partition(clean, labels, config=IsplConfig(**cell.settings), seed=cell.seed)
    return poison_set(images, labels, cell.attack, rate=rate, seed=cell.seed, strata=strata, **cell.needed)


def code_digest() -> str:
    """Return 12 hex digits of the code that a cell's figures depend on."""
    digest = hashlib.sha256()
    here = Path(__file__)
    for path in (*(ROOT / "sifters" / f"{name}.py" for name in MODULES), here, here.with_name("sift_cell.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
