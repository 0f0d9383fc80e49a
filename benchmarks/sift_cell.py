"""One cell of sift.py: sift a poisoned set, measure what was picked and kept, train on what was kept.

NCR = 100 * share of poison among what is picked / share of poison in the set: 0 is pure, 100 is random. Picked are the
least suspicious of each class. `false` and `missed`: clean samples that are removed and poison that is not, removed
being what a method does not keep, or the tenth that is most suspicious where it only ranks. `epochs`: how often the
whole set was trained on, by all models together; a round of Meta-Sift counts once and costs about three plain steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sift_sets import NETWORK, Cell, labelled, poisoned, read_pictures, shown, victim
from torch.nn import functional

from tarsift.sifters.attacks import PoisonedSet
from tarsift.sifters.baselines import BaselineConfig, sift_by
from tarsift.sifters.inputs import Pixels
from tarsift.sifters.ispl import IsplConfig, ispl
from tarsift.sifters.meta_sift import MetaSiftConfig, meta_sift
from tarsift.sifters.result import SiftResult, clean_base_set
from tarsift.sifters.settings import FitConfig
from tarsift.sifters.training import Learner

SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of what is picked, as parts of the set
REMOVED = 0.1  # by methods that only rank
BESIDE = ("doubt", "diluted_loss")  # details of Meta-Sift: what the paper ranks by, and what needs no weights
FINAL_RATE = 0.1


@contextmanager
def counted() -> Iterator[list[int]]:
    """Note how many samples each call of `Learner.fit` trains on, epochs included."""
    counts: list[int] = []
    fit = Learner.fit

    def counting(self: Learner, rows: torch.Tensor, *, epochs: int, draw: torch.Generator) -> None:
        counts.append(len(rows) * epochs)
        fit(self, rows, epochs=epochs, draw=draw)

    Learner.fit = counting
    try:
        yield counts
    finally:
        Learner.fit = fit


def sift(cell: Cell, x: np.ndarray, labels: np.ndarray) -> tuple[SiftResult, float]:
    """Return a method's verdict, and how many epochs it has trained."""
    settings = {"network": NETWORK if x.dtype == np.uint8 else None, **cell.settings}
    if cell.method == "meta_sift":
        config, steps = MetaSiftConfig(**settings), [0]
        result = meta_sift(x, labels, config=config, seed=cell.seed, on_step=lambda step, _: steps.append(step))
        return result, config.sifters * steps[-1] * min(config.batch_size, len(labels)) / len(labels)
    with counted() as counts:
        if cell.method == "ispl":
            result = ispl(x, labels, config=IsplConfig(**settings), seed=cell.seed)
        else:
            result = sift_by(cell.method, x, labels, config=BaselineConfig(**settings), seed=cell.seed)
    return result, sum(counts) / len(labels)


def ncr(score: np.ndarray, made: PoisonedSet) -> dict[str, float]:
    """Return by size how poisoned what is picked is, in percent of how poisoned the set is."""
    n, rate = len(made.poison), made.poison.mean()
    picked = {size: clean_base_set(score, made.labels, round(size * n)) for size in SIZES}
    return {f"{size:g}": round(100 * made.poison[rows].mean() / rate, 2) for size, rows in picked.items()}


def figures(result: SiftResult, made: PoisonedSet) -> dict[str, Any]:
    """Measure a verdict: NCR by size, of what else could be ranked by as well, and mistakes."""
    n = len(made.poison)
    removed = np.zeros(n, bool)
    removed[np.argsort(-result.score, kind="stable")[: round(REMOVED * n)]] = True
    if result.kept is not None:
        removed = ~result.kept
    return {
        "ncr": ncr(result.score, made),
        "ncr_by": {name: ncr(result.details[name], made) for name in BESIDE if name in result.details},
        "false": int((removed & ~made.poison).sum()),
        "missed": int((~removed & made.poison).sum()),
    }


def after_training(cell: Cell, made: PoisonedSet, kept: np.ndarray, data: Path) -> dict[str, float]:
    """Train a `victim` on the rows that are kept, as many steps as on all, and measure accuracy and attack success.

    An epoch goes through the rows in random order and begins anew until it has as many as the set; where nothing is
    kept, nothing is learned.
    """
    given = labelled(made.images, made.labels, cell)
    learner = Learner(victim(given.classes, cell.seed), given.inputs, given.targets, FitConfig())
    rows, batch = torch.from_numpy(np.flatnonzero(kept)), learner.config.batch_size
    rates = torch.optim.lr_scheduler.OneCycleLR(
        learner.optimizer, FINAL_RATE, total_steps=1 + cell.final_epochs * -(-len(given.rows) // batch)
    )
    for _ in range(cell.final_epochs if len(rows) else 0):
        order = rows[torch.randperm(len(rows), generator=given.draw)]
        for part in order[torch.arange(len(given.rows)) % len(order)].split(batch):
            loss = functional.cross_entropy(learner(given.inputs.plain(part)), given.targets[part])
            learner.optimizer.zero_grad()
            loss.backward()
            learner.optimizer.step()
            rates.step()
    images, labels = read_pictures(sorted((data / "cifar10-test").glob("*.tar.gz")), cell.samples)
    assert made.trigger is not None
    plain, triggered = (guesses(learner, pictures) for pictures in (images, made.trigger(images)))
    return {
        "accuracy": round(float((plain == labels).mean()), 4),
        "success": round(made.success(triggered, labels), 4),
        "success_without_trigger": round(made.success(plain, labels), 4),
    }


def guesses(learner: Learner, images: np.ndarray) -> np.ndarray:
    """Return the class a learner takes each test picture for; it sees them scaled as its own."""
    assert isinstance(learner.inputs, Pixels)
    pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    test = Learner(learner.net, replace(learner.inputs, pictures=pictures), learner.targets, learner.config)
    return test.judge(torch.arange(len(images))).argmax(dim=1).numpy()


def run_cell(job: tuple[Cell, Path, Path]) -> dict[str, Any]:
    """Do one cell."""
    cell, data, cache = job
    torch.set_num_threads(1)
    made = poisoned(cell, data, cache)
    line: dict[str, Any] = {"cell": asdict(cell), "poisoned": int(made.poison.sum())}
    kept = {"none": np.ones(len(made.poison), bool)}
    if cell.method != "none":
        x = shown(cell, made.images, data, cache)
        wall, cpu = time.monotonic(), time.process_time()
        result, epochs = sift(cell, x, made.labels)
        line |= {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
        line |= {"epochs": round(epochs, 1), "facts": dict(result.facts), **figures(result, made)}
        if result.kept is not None:
            at_random = np.random.default_rng([cell.seed, 17]).permutation(result.kept)
            kept = {cell.method: result.kept, "random": at_random}
    if cell.final_epochs:
        line["after"] = {name: after_training(cell, made, rows, data) for name, rows in kept.items()}
    return line
