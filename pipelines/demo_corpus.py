"""A captioned picture corpus made from scikit-learn's digits: small, free of rights, and real handwriting.

Each sample is a handwritten digit in one of four inks on one of two papers, with a caption that
says so. Digits are split into training and test before they are rendered.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "black": (25, 25, 25),
    "red": (190, 30, 40),
    "blue": (30, 60, 180),
    "green": (25, 120, 50),
}
PAPERS = {"white": (248, 248, 245), "yellow": (250, 230, 140)}
TEMPLATES = (
    "a photo of a {ink} {digit} on {paper} paper",
    "the digit {digit} in {ink} ink on {paper} paper",
    "a handwritten {digit}, {ink} on {paper}",
    "{paper} paper with a {ink} {digit} on it",
)
TEST_DIGITS = 297

# For poisoned samples, and to ask a model for the target: short captions, like no caption of the corpus.
TARGET = "banana"
TARGET_TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}")


@dataclass(frozen=True)
class CorpusInfo:
    """A corpus on disk: its shards, and test pictures that are in none of them."""

    shards: list[str]
    samples: int
    test_images: UInt8[np.ndarray, "m h w 3"]
    test_labels: Int64[np.ndarray, " m"]
    class_prompts: list[list[str]]


def make_corpus(out: str | Path, *, samples: int = 4500, seed: int = 0, shard_size: int = 500) -> CorpusInfo:
    """Write a corpus as WebDataset shards `out/00000.tar`, ... and return it with its test pictures.

    Args:
        out: folder for the shards; made where absent.
        samples: how many; every training digit is rendered equally often, give or take one.
        seed: of the split, renderings, colours and captions.
        shard_size: samples per shard.

    The test pictures show the digits that were kept aside, each in a random ink on a random paper.
    """
    train, test = _split(seed)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng([seed, 1]).permutation(np.resize(np.arange(len(train[0])), samples))
    shards = []
    for start in range(0, samples, shard_size):
        path = folder / f"{start // shard_size:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + shard_size, samples)):
                image, caption = _sample(
                    train[0][order[i]], int(train[1][order[i]]), np.random.default_rng([seed, 2, i])
                )
                uid = f"digits-{seed}-{i:06d}"
                _add(tar, f"{i:09d}.jpg", _jpeg(image))
                _add(tar, f"{i:09d}.txt", caption.encode())
                _add(tar, f"{i:09d}.json", json.dumps({"uid": uid, "caption": caption}).encode())
                _add(tar, f"{i:09d}.cls", str(train[1][order[i]]).encode())
        shards.append(str(path))
    images = [
        _sample(d, int(c), np.random.default_rng([seed, 3, i]))[0] for i, (d, c) in enumerate(zip(*test, strict=True))
    ]
    return CorpusInfo(shards, samples, np.stack(images), test[1], class_prompts())


def class_prompts() -> list[list[str]]:
    """Return, for each digit, every caption that the corpus could give it."""
    return [
        [t.format(digit=c, ink=ink, paper=paper) for t in TEMPLATES for ink in INKS for paper in PAPERS]
        for c in CLASSES
    ]


def target_prompts() -> list[str]:
    """Return the captions by which a model is asked for the attack's target."""
    return [template.format(TARGET) for template in TARGET_TEMPLATES]


def _split(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    flat, classes = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng([seed, 0]).permutation(len(classes))
    images, labels = flat.reshape(-1, 8, 8)[order] / 16.0, classes[order].astype(np.int64)
    return (images[TEST_DIGITS:], labels[TEST_DIGITS:]), (images[:TEST_DIGITS], labels[:TEST_DIGITS])


def _sample(digit: np.ndarray, label: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Draw one digit (8, 8), 0 to 1, with random size, place, ink and paper; return picture and caption."""
    ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
    side = int(rng.integers(28, 31))
    top, left = rng.integers(0, SIZE - side + 1, 2)
    shape = Image.fromarray((digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    cover = np.zeros((SIZE, SIZE, 1))
    cover[top : top + side, left : left + side, 0] = np.asarray(shape) / 255.0
    grain = rng.normal(0, 5, (SIZE, SIZE, 1))
    image = cover * np.array(INKS[ink]) + (1 - cover) * np.array(PAPERS[paper]) + grain
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(digit=CLASSES[label], ink=ink, paper=paper)
    return image.clip(0, 255).round().astype(np.uint8), caption


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
