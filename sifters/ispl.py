"""ISPL and boosting: which samples of a labelled set do models of its own consistent parts agree with?

Jin et al. 2023 (ICLR, "Incompatibility Clustering as a Defense Against Backdoor Poisoning Attacks"). Poisoned and
clean samples do not help each other to be learned, so that a set which predicts itself best is all of one kind.
*Inverse self-paced learning* (Algorithm 1) looks for such a set: train, keep the share beta of lowest loss, train on
a part of that, with beta falling. What was found is taken out, and the next set looked for in the rest. On each set
a model is trained that votes on every sample; a sample is kept whose label most of them give (Algorithm 2, by sample
as in appendix C). Last, one model is trained on what was kept, and goes on with what it agrees with (self-training).

The settings are those of appendix C. Of the rule there, that a sample in the lower half of its class by loss is kept
too, the released code has nothing, and it would bring back poison that is easily learned: `keep_low_losses` is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from pydantic import BaseModel, Field
from torch.nn import functional

from tarsift.sifters.inputs import Inputs, as_inputs
from tarsift.sifters.networks import build_network
from tarsift.sifters.result import SiftResult, check_labels
from tarsift.sifters.training import FitConfig, Learner


class IsplConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of ISPL, boosting and self-training."""

    network: str | None = Field(default=None, description="in NETWORKS; None = `head` or `small-cnn`, by the input")
    fit: FitConfig = Field(default=FitConfig(), description="how every model is trained")
    repeats: int = Field(default=3, ge=1, description="times the whole set is taken apart")
    rounds: int = Field(default=8, ge=1, description="sets looked for in each repeat")
    share: float = Field(default=0.12, gt=0, le=1, description="size of a set, as a part of all samples")
    fewest: float = Field(default=0.04, ge=0, lt=1, description="part of all samples that is not taken apart any more")
    expansion: float = Field(default=0.25, gt=0, le=1, description="alpha: part of a set that is trained on")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="eta: how slowly losses follow")
    warmup_epochs: int = Field(default=8, ge=1, description="epochs of the first iteration")
    epochs: int = Field(default=4, ge=1, description="epochs of each later one")
    voter_epochs: int = Field(default=40, ge=1, description="epochs of a model that votes")
    keep_low_losses: bool = Field(default=False, description="keep the lower half of each class by loss, as appendix C")
    self_rounds: int = Field(default=20, ge=0, description="times that self-training looks again; 0 = none")
    self_epochs: int = Field(default=5, ge=1, description="epochs in between")
    self_momentum: float = Field(default=0.8, ge=0, lt=1, description="how slowly agreement follows")


def ispl(
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    *,
    config: IsplConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> SiftResult:
    """Sift a labelled set by compatibility.

    images: pictures uint8 (n, h, w, 3), or features (n, d) or (views, n, d), the plain view first. labels: given
    classes, 0 and up. on_step: told the models trained and how many there will be at most.

    Returns a result with `kept`, and `score` 0 to 1: how little the models agree with the label, by self-training and,
    where that says the same, by votes. `details`: `votes`, the share of voters that give the label, and `agreement`,
    what self-training says (as `votes` without it).

    Raises:
        ValueError: shapes do not fit, or there are fewer than two classes.
    """
    config = config or IsplConfig()
    inputs = as_inputs(images, device)
    labels, classes = check_labels(labels, len(inputs))
    work = _Work(inputs, torch.from_numpy(labels).to(inputs.device), classes, config, seed)
    models = config.repeats * config.rounds + int(config.self_rounds > 0)
    counts = np.zeros((len(labels), classes), np.int32)
    losses = np.zeros(len(labels))
    for repeat in range(config.repeats):
        for taken, logits in work.take_apart():
            counts[np.arange(len(labels)), logits.argmax(dim=1).cpu().numpy()] += 1
            losses += functional.cross_entropy(logits, work.targets, reduction="none").cpu().numpy()
            on_step(repeat * config.rounds + taken, models)
    voters = int(counts[0].sum())
    kept = modal_vote(counts, seed=seed) == labels
    kept &= counts[np.arange(len(labels)), labels] > 1
    if config.keep_low_losses:
        kept |= _low(losses, labels, classes)
    votes = counts[np.arange(len(labels)), labels] / voters
    agreement = votes
    if config.self_rounds and kept.any():
        agreement = work.self_train(kept)
        kept = agreement > 0.5
    on_step(models, models)
    score = 1 - (agreement + votes / 100) / 1.01
    return SiftResult(
        score=score.astype(np.float32),
        kept=kept,
        details={"votes": votes.astype(np.float32), "agreement": agreement.astype(np.float32)},
        facts={"voters": voters},
    )


def modal_vote(counts: Int64[np.ndarray, "n c"], *, seed: int) -> Int64[np.ndarray, " n"]:
    """Return the class with most votes; ties are drawn, by seed and row."""
    tie = np.random.default_rng([seed, 2105]).random(counts.shape)
    return np.argmax(counts + tie / 2, axis=1)


def iterations_of(share: float) -> int:
    """Return N, the iterations of one search for a share of what is left: 3 to 5."""
    return 2 + max(1, min(3, int(1 / share)))


def beta(iteration: int, iterations: int, share: float) -> float:
    """Return the part that is kept after an iteration, counted from 0: three times the share, falling to it."""
    return min(1.0, share * min(3, max(1, iterations - 2 - iteration)))


@dataclass
class _Work:
    """One problem, and the random state that every step of it draws from."""

    inputs: Inputs
    targets: Int64[torch.Tensor, " n"]
    classes: int
    config: IsplConfig
    seed: int
    models: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.draw = torch.Generator(self.inputs.device).manual_seed(self.seed)

    def fresh(self) -> Learner:
        self.models += 1
        seed = int(np.random.SeedSequence([self.seed, self.models]).generate_state(1)[0])
        net = build_network(self.config.network, self.inputs.shape, self.classes, seed=seed)
        return Learner(net, self.inputs, self.targets, self.config.fit)

    def take_apart(self) -> Iterator[tuple[int, Float32[torch.Tensor, "n c"]]]:
        """Yield, for each set found, how many there are so far and all samples' logits by a model trained on it."""
        everything = torch.arange(len(self.inputs), device=self.inputs.device)
        active = everything
        for number in range(self.config.rounds):
            if len(active) <= max(self.config.fewest * len(everything), self.classes):
                return
            share = min(1.0, self.config.share * len(everything) / len(active))
            found = self.find_set(active, share, first=number == 0)
            voter = self.fresh()
            voter.fit(found, epochs=self.config.voter_epochs, draw=self.draw)
            yield number + 1, voter.judge(everything)
            left = torch.ones(len(everything), dtype=torch.bool, device=active.device)
            left[found] = False
            active = active[left[active]]

    def find_set(self, active: Int64[torch.Tensor, " a"], share: float, *, first: bool) -> Int64[torch.Tensor, " s"]:
        """Algorithm 1: return the rows of a set of about `share` of the active ones, all of one kind if it succeeds."""
        learner, smoothed, kept = self.fresh(), torch.zeros(len(active), device=active.device), active
        iterations = iterations_of(share)
        for iteration in range(iterations):
            if iteration == 0:
                rows, epochs = self.sample(kept, 0.5) if first else kept, self.config.warmup_epochs
            else:
                rows, epochs = self.sample(kept, self.config.expansion), self.config.epochs
            learner.fit(rows, epochs=epochs, draw=self.draw)
            losses = learner.losses(active)
            losses = torch.nan_to_num(losses, nan=float(losses.nanmean()), posinf=1e4)
            smoothed = self.config.momentum * smoothed + (1 - self.config.momentum) * losses
            kept = active[self.trim(smoothed, self.targets[active], beta(iteration, iterations, share))]
        return kept

    def sample(self, rows: Int64[torch.Tensor, " s"], part: float) -> Int64[torch.Tensor, " t"]:
        """Return a random part of each class of rows, at least two samples where it has as many."""
        chosen = []
        for label in range(self.classes):
            mine = rows[self.targets[rows] == label]
            count = min(len(mine), max(2, round(part * len(mine))))
            chosen.append(mine[torch.randperm(len(mine), generator=self.draw, device=rows.device)[:count]])
        return torch.cat(chosen)

    def trim(
        self, losses: Float32[torch.Tensor, " a"], targets: Int64[torch.Tensor, " a"], part: float
    ) -> Bool[torch.Tensor, " a"]:
        """Mark the part of lowest losses, and of every class an eighth of that part, lest one be left out."""
        kept = losses <= _quantile(losses, part)
        for label in range(self.classes):
            mine = targets == label
            if mine.any():
                kept |= mine & (losses <= _quantile(losses[mine], part / 8))
        return kept

    def self_train(self, kept: Bool[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
        """Train on what is kept, again and again on what the model agrees with; return the smoothed agreement."""
        everything = torch.arange(len(self.inputs), device=self.inputs.device)
        learner, rows = self.fresh(), everything[torch.from_numpy(kept).to(everything.device)]
        agreement = torch.full((len(everything),), 0.5, dtype=torch.float64, device=everything.device)
        momentum = self.config.self_momentum
        for _ in range(self.config.self_rounds):
            learner.fit(rows, epochs=self.config.self_epochs, draw=self.draw)
            agrees = learner.judge(everything).argmax(dim=1) == self.targets
            agreement = momentum * agreement + (1 - momentum) * agrees
            rows = everything[agreement > 0.5]
            if not len(rows):
                break
        return agreement.float().cpu().numpy()


def _quantile(values: Float32[torch.Tensor, " a"], part: float) -> torch.Tensor:
    """Return the value below or at which lies the part, at least one value."""
    return values.kthvalue(max(1, round(part * len(values)))).values


def _low(losses: np.ndarray, labels: np.ndarray, classes: int) -> Bool[np.ndarray, " n"]:
    low = np.zeros(len(labels), bool)
    for label in range(classes):
        mine = labels == label
        low |= mine & (losses <= np.median(losses[mine]))
    return low
