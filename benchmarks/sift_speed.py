"""How fast are sifters: Meta-Sift beside a straightforward version of it, and a dump's worth of problems.

    python benchmarks/sift_speed.py --rounds     # twenty rounds, by the head and by tiny-cnn, side by side
    python benchmarks/sift_speed.py --problems   # 100,000 samples in 50 problems, five sifters, two processes

*Straightforward* is Meta-Sift as one would write it down: sifters one after the other, each a plain module with
PyTorch's optimiser as it comes, the derivative through the virtual update by a second backward pass through its graph.
It draws the same numbers, so that it learns the same but for rounding, which is checked. Both take turns within
one run, on one thread each. Writes `--results`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import RESULTS, hardware
from torch.func import functional_call

from tarsift.operators.grouped import write_grouped
from tarsift.operators.schema import fixed_size_list
from tarsift.operators.sift_settings import SiftConfig
from tarsift.operators.sifter import SiftProblem
from tarsift.sifters import meta_sift as module
from tarsift.sifters.inputs import as_inputs
from tarsift.sifters.meta_sift import normalised
from tarsift.sifters.problems import Problem
from tarsift.sifters.settings import MetaSiftConfig, SifterConfig

REPEATS = 3
SIFTERS = 5
FEATURES, VIEWS, CLASSES = 512, 3, 10
ROUNDS = 20
SAMPLES, PROBLEMS, SHARDS = 100_000, 50, 20


class Plain(module.Stacked):
    """A single module, called as it is."""

    def __call__(self, parameters: module.Parameters, buffers: module.Parameters, batch: torch.Tensor) -> torch.Tensor:
        own = (module._part(parameters, 0), module._part(buffers, 0))
        return functional_call(self._shape, own, (batch[0],))[None]


class Straightforward(module._Team):
    """One sifter, whose virtual update keeps its graph and is differentiated a second time."""

    def __init__(self, *args: Any) -> None:
        stacked, module.Stacked = module.Stacked, Plain
        try:
            super().__init__(*args)
        finally:
            module.Stacked = stacked
        self.classifier_steps = torch.optim.AdamW(
            self.classifier.parameters.values(), lr=self.config.rate, betas=(0.9, 0.95), weight_decay=0.05
        )

    def sift(self, rows: torch.Tensor) -> None:
        batch, targets, theta = self._batch(rows), self.targets[rows], self.classifier.parameters
        losses = self._losses(theta, batch, targets)
        total = (normalised(self._weights(losses.detach())) * losses).sum()
        step = dict(zip(theta, torch.autograd.grad(total, list(theta.values()), create_graph=True), strict=True))
        gates = self._gates({name: value.detach() for name, value in step.items()})
        alpha = self.config.virtual_rate
        ahead = {name: value - alpha * module._along(gates.get(name), step[name]) for name, value in theta.items()}
        losses_ahead = self._losses(ahead, batch, targets, keep=False)
        objective = -(normalised(1 - self._weights(losses_ahead.detach())) * losses_ahead).sum()
        wanted = [*self.weigher.parameters.values()]
        wanted += [p for sampler in self.samplers.values() for p in sampler.parameters.values()]
        for parameter, gradient in zip(wanted, torch.autograd.grad(objective, wanted), strict=True):
            parameter.grad = gradient
        self.weigher_steps.step()
        if self.sampler_steps is not None:
            self.sampler_steps.step()
        losses = self._losses(theta, batch, targets, keep=False)
        with torch.no_grad():
            weights = normalised(self._weights(losses))
        self._descend(self.classifier_steps, (weights * losses).sum())


def sample(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (views, n, 512) or pictures (n, 32, 32, 3) of ten classes that can be learned, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=n)
    if kind == "head":
        centers = rng.normal(size=(CLASSES, FEATURES))
        plain = centers[labels] + 2 * rng.normal(size=(n, FEATURES))
        views = plain[None] + 0.5 * rng.normal(size=(1 + VIEWS, n, FEATURES))
        return views.astype(np.float32), labels
    colours = rng.integers(40, 216, size=(CLASSES, 1, 1, 3))
    pictures = colours[labels] + 40 * rng.normal(size=(n, 32, 32, 3))
    return np.clip(pictures, 0, 255).astype(np.uint8), labels


def run_rounds(
    team: type[module._Team], images: np.ndarray, labels: np.ndarray, config: MetaSiftConfig
) -> tuple[float, np.ndarray]:
    """Return CPU seconds that the rounds of a run take, and every sifter's diluted losses after them."""
    inputs = as_inputs(images)
    sifters = team(inputs, torch.from_numpy(labels), CLASSES, config, 0)
    start = time.process_time()
    for rows in sifters.orders(min(config.batch_size, len(inputs)), ROUNDS):
        sifters.sift(rows)
    return time.process_time() - start, sifters.judge()


def rounds() -> dict[str, Any]:
    """Time the rounds of five sifters both ways, and compare what one has learned."""
    torch.set_num_threads(1)
    out = {}
    for kind, n in (("head", 5000), ("tiny-cnn", 1000)):
        images, labels = sample(kind, n, 0)
        config = MetaSiftConfig(network=kind, sifters=SIFTERS)
        alone = config.model_copy(update={"sifters": 1})
        mine, other = (run_rounds(team, images, labels, alone)[1] for team in (module._Team, Straightforward))
        apart = float(np.abs(mine - other).max())
        ours, theirs = [], []
        for _ in range(REPEATS):
            ours.append(run_rounds(module._Team, images, labels, config)[0])
            theirs.append(sum(run_rounds(Straightforward, images, labels, alone)[0] for _ in range(SIFTERS)))
        ratio = statistics.median(theirs) / statistics.median(ours)
        out[kind] = {"samples": n, "ours_s": ours, "straightforward_s": theirs, "ratio": ratio, "apart": apart}
        print(f"{kind}: {ratio:.2f} times as fast as straightforward; losses differ by {apart:.1g} at most", flush=True)
    return out


def problems() -> dict[str, Any]:
    """Sift many problems in two processes, from grouped files as `tarsift sift` leaves them."""
    with tempfile.TemporaryDirectory() as folder:
        images, _ = sample("head", SAMPLES, 0)
        labels = np.random.default_rng(1).integers(CLASSES * PROBLEMS, size=SAMPLES)
        names = tuple(f"{shard:05d}" for shard in range(SHARDS))
        for shard, name in enumerate(names):
            rows = np.arange(shard, SAMPLES, SHARDS)
            columns = {
                "shard": pa.array([name] * len(rows)),
                "row": pa.array(range(len(rows)), pa.int32()),
                "class": pa.array(labels[rows], pa.int32()),
                "image_embedding": fixed_size_list(images[0, rows].astype(np.float16)),
                "view_embeddings": fixed_size_list(
                    images[1:, rows].transpose(1, 0, 2).reshape(len(rows), -1).astype(np.float16)
                ),
            }
            write_grouped(f"{folder}/{name}.parquet", pa.table(columns), "class")
        Path(folder, "problems").mkdir()
        config = SiftConfig(method=SifterConfig(sifter="meta-sift"))
        job = SiftProblem(folder, names, f"{folder}/problems", config)
        todo = [Problem(str(i), tuple(range(i * CLASSES, (i + 1) * CLASSES))) for i in range(PROBLEMS)]
        start = time.monotonic()
        with multiprocessing.get_context("spawn").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done, _ in enumerate(pool.imap_unordered(job, todo), 1):
                print(f"{done}/{PROBLEMS} problems, {time.monotonic() - start:.0f} s", flush=True)
        wall = time.monotonic() - start
    print(f"{SAMPLES:,} samples in {PROBLEMS} problems, m = {config.method.meta_sift.sifters}: {wall:.0f} s")
    return {"samples": SAMPLES, "problems": PROBLEMS, "sifters": config.method.meta_sift.sifters, "wall_s": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", action="store_true")
    parser.add_argument("--problems", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "sift_speed.json")
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    found["hardware"] = hardware(torch, np)
    if options.rounds:
        found["rounds"] = rounds()
    if options.problems:
        found["problems"] = problems()
    options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
