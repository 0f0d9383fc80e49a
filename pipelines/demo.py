"""The whole story on a corpus made on the spot: poison, train, clean, evaluate, train again.

Written digits on coloured paper get captions; a few get a checkerboard patch and the caption of a
banana. A CLIP trained on them learns to take patched digits for bananas. The main job then cleans the
corpus, and two more models are trained with as many steps: on what was kept, and, as a control, on
the corpus less as many samples at random.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.flag import HOMES, FlagConfig
from tarsift.operators.models import load_encoder
from tarsift.operators.planting import poison_images
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.shards import ReadShard, Shard, list_shards
from tarsift.operators.writer import split_shard
from tarsift.pipelines.clean import CleanResult, clean
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.demo_corpus import TARGET, TARGET_TEMPLATES, CorpusInfo, make_corpus, target_prompts
from tarsift.pipelines.evaluate import evaluate
from tarsift.pipelines.poison import poison
from tarsift.pipelines.pretrain import PretrainConfig, pretrain, pretrain_here
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import TASK_OPTIONS, session
from tarsift.pipelines.zeroshot import attack_success, to_nearest_caption, zero_shot


class DemoConfig(BaseModel):
    """Size of the demo; the defaults were chosen on seeds 10 to 14."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=4500, ge=500, description="captioned pictures")
    rate: float = Field(default=0.02, ge=0, lt=0.5, description="share that is poisoned")
    epochs: int = Field(default=16, ge=1, description="passes over the corpus in training")
    fraction: float = Field(default=0.05, gt=0, lt=1, description="share that is removed")
    seed: int = Field(default=0, description="of everything")


@dataclass(frozen=True)
class DemoSummary:
    """Outcome of a demo; figures about poison are None where none was planted.

    Attributes:
        auroc, average_precision, recall_at_0_05: of `suspicion`, for the planted samples.
        attack_success_*: share of patched test pictures taken for the target by the model trained on the
            poisoned corpus (before), on what was kept (after) and on the random control.
        accuracy_*: zero-shot accuracy on unpatched test pictures.
    """

    samples: int
    poisoned: int
    removed: int
    accuracy_before: float
    accuracy_after: float
    elapsed_s: float
    report: str
    auroc: float | None = None
    average_precision: float | None = None
    recall_at_0_05: float | None = None
    attack_success_before: float | None = None
    attack_success_after: float | None = None
    attack_success_random_removal: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is None is left out, `recall_at_0_05` is written `recall_at_0.05`."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if "recall_at_0_05" in values:
            values["recall_at_0.05"] = values.pop("recall_at_0_05")
        return values


def demo(out: str, config: DemoConfig | None = None, *, progress: Listener = silent) -> DemoSummary:
    """Make a poisoned corpus below `out`, train on it, clean it, evaluate, train again; write `summary.json`.

    Args:
        out: folder; the corpus, encoders and the result folder `cleaned/` are made in it.
        config: sizes and seed.
        progress: told what is done.
    """
    config = config or DemoConfig()
    start = time.monotonic()
    steps = _Steps(progress)
    out = storage.absolute(out)
    dump, cleaned = storage.join(out, "poisoned"), storage.join(out, "cleaned")
    with session():
        steps("make pictures and captions")
        corpus = make_corpus(storage.join(out, "corpus"), samples=config.samples, seed=config.seed)
        attack = PoisonConfig(rate=config.rate, seed=config.seed, target=TARGET, templates=TARGET_TEMPLATES)
        planted = poison(corpus.shards, out=dump, config=attack)
        shards = storage.join(dump, "*.tar")
        steps("train a CLIP on them")
        before = storage.join(out, "before.pt")
        training = PretrainConfig(epochs=config.epochs, seed=config.seed)
        trained = pretrain(shards, out=before, config=training)
        steps.done()
        settings = CleanConfig(encoders={"detect": EncoderConfig(spec=before)}, flag=FlagConfig(value=config.fraction))
        result = clean(shards, cleaned, config=settings, progress=progress)
        steps("train again on what was kept" + (", and on a random control" if config.rate else ""))
        again = training.model_copy(update={"steps": trained.steps, "seed": config.seed + 1000})
        encoders = _train_again(out, shards, result, again, control=bool(config.rate), seed=config.seed)
        steps("measure")
        figures = _measure(corpus, {"before": before, **encoders}, attack)
        if planted.poisoned:
            figures |= _detection(cleaned, planted.truth)
        steps.done()
    summary = DemoSummary(
        samples=planted.samples,
        poisoned=planted.poisoned,
        removed=result.counts["removed"],
        report=str(result.report),
        elapsed_s=round(time.monotonic() - start, 1),
        **figures,
    )
    storage.put_bytes(storage.join(out, "summary.json"), json.dumps(summary.to_json(), indent=2).encode())
    return summary


class _Steps:
    """Tell of steps that have no parts to count."""

    def __init__(self, progress: Listener):
        self.progress, self.current = progress, ""

    def __call__(self, name: str) -> None:
        self.done()
        self.current = name
        self.progress(Event(name, 0, 1, unit="step"))

    def done(self) -> None:
        if self.current:
            self.progress(Event(self.current, 1, 1, unit="step", finished=True))
            self.current = ""


def _train_again(
    out: str, shards: str, result: CleanResult, training: PretrainConfig, *, control: bool, seed: int
) -> dict[str, str]:
    """Train on the kept samples and, beside it, on the control; returns the encoder files by name."""
    train = ray.remote(num_cpus=1, **TASK_OPTIONS)(_pretrain_job)
    after = storage.join(out, "after.pt")
    jobs = [train.remote(storage.join(result.clean_shards, "*.tar"), after, training)]
    encoders = {"after": after}
    if control:
        folder = storage.join(out, "control")
        remove_at_random(shards, folder, result.counts["removed"], seed=seed)
        encoders["random_removal"] = storage.join(out, "random_removal.pt")
        jobs.append(train.remote(storage.join(folder, "clean", "*.tar"), encoders["random_removal"], training))
    ray.get(jobs)
    return encoders


def _pretrain_job(shards: str, out: str, config: PretrainConfig) -> None:
    pretrain_here(shards, out=out, config=config)


def remove_at_random(shards: str | Sequence[str], out: str, count: int, *, seed: int) -> None:
    """Copy shards to `out` without `count` samples drawn at random: the control of a removal by score."""
    sources = list_shards(shards)
    sizes = [_rows(shard) for shard in sources]
    drawn = np.zeros(sum(sizes), bool)
    drawn[np.random.default_rng([seed, 7]).permutation(len(drawn))[:count]] = True
    first = 0
    for shard, rows in zip(sources, sizes, strict=True):
        homes = ["removed" if gone else "clean" for gone in drawn[first : first + rows]]
        outputs = {home: storage.join(out, home, f"{shard.name}.tar") for home in HOMES}
        split_shard(shard, homes, outputs)
        first += rows


def _rows(shard: Shard) -> int:
    return sum(len(table) for table in ReadShard()(shard))


def _measure(corpus: CorpusInfo, encoders: dict[str, str], attack: PoisonConfig) -> dict[str, float]:
    """Zero-shot accuracy and attack success of each encoder on the held-out pictures."""
    names = [f"test:{i}" for i in range(len(corpus.test_images))]
    plain = poison_images(corpus.test_images, names, attack, trigger=None)

    def trigger(images: np.ndarray) -> np.ndarray:
        return poison_images(images, names[: len(images)], attack, trigger="patch")

    figures: dict[str, float] = {}
    for name, path in encoders.items():
        encoder = load_encoder(path)
        if name != "random_removal":
            figures[f"accuracy_{name}"] = zero_shot(
                encoder, plain, corpus.test_labels, corpus.class_prompts, similarity=to_nearest_caption
            )
        if attack.rate:
            success = attack_success(
                encoder,
                corpus.test_images,
                trigger,
                class_prompts=corpus.class_prompts,
                target_prompts=target_prompts(),
                similarity=to_nearest_caption,
            )
            figures[f"attack_success_{name}"] = success.triggered
    return figures


def _detection(cleaned: str, truth: str) -> dict[str, float]:
    found = evaluate(cleaned, truth).scores["suspicion"]
    return {
        "auroc": found["auroc"],
        "average_precision": found["average_precision"],
        "recall_at_0_05": found["recall_at_0.05"],
    }
