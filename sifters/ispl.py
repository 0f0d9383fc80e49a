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

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch.nn import functional

from tarsift.sifters.result import SiftResult, State
from tarsift.sifters.settings import IsplConfig
from tarsift.sifters.training import LabelledSet


def ispl(
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    *,
    config: IsplConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
) -> SiftResult:
    """Sift a labelled set by compatibility.

    images: pictures uint8 (n, h, w, 3), or features (n, d) or (views, n, d), the plain view first. labels: given
    classes, 0 and up. on_step: told the models trained and how many there will be at most. save: given what there is
    after each voter; state: the last of these, of a run with the same arguments that was broken off. On a CPU the
    result is the same, bit for bit, as that of a run that was not.

    Returns a result with `kept`, and `score` 0 to 1: how little the models agree with the label, by self-training and,
    where that says the same, by votes. `details`: `votes`, the share of voters that give the label, and `agreement`,
    what self-training says (as `votes` without it).

    Raises:
        ValueError: shapes do not fit, or there are fewer than two classes.
    """
    config = config or IsplConfig()
    given = LabelledSet(images, labels, network=config.network, fit=config.fit, seed=seed, device=device)
    labels, classes = given.labels, given.classes
    models = config.repeats * config.rounds + int(config.self_rounds > 0)
    poll = _Poll(given, config, state)
    while not poll.closed:
        poll.vote()
        save(poll.state())
        on_step(poll.repeat * config.rounds + poll.round, models)
    counts, losses = poll.counts, poll.losses
    voters = int(counts[0].sum())
    kept = modal_vote(counts, seed=seed) == labels
    kept &= counts[np.arange(len(labels)), labels] > 1
    if config.keep_low_losses:
        kept |= _low(losses, labels, classes)
    votes = counts[np.arange(len(labels)), labels] / voters
    agreement = votes
    if config.self_rounds and kept.any():
        agreement = _self_train(given, kept, config)
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


class _Poll:
    """The votes so far, and what is left to be taken apart in this repeat."""

    def __init__(self, given: LabelledSet, config: IsplConfig, state: State | None) -> None:
        self.given, self.config = given, config
        self.repeat = self.round = 0
        self.counts = np.zeros((len(given.labels), given.classes), np.int32)
        self.losses = np.zeros(len(given.labels))
        self.active = given.rows
        if state is not None:
            self.repeat, self.round = (int(number) for number in state["place"])
            self.counts, self.losses = state["counts"].copy(), state["losses"].copy()
            self.active = torch.from_numpy(state["active"]).to(given.rows.device)
            given.restore({name: state[name] for name in ("draw", "learners")})

    @property
    def closed(self) -> bool:
        return self.repeat >= self.config.repeats

    def vote(self) -> None:
        """Find the next set, and have a model that is trained on it vote on all samples."""
        given = self.given
        found, self.active = next_set(given, self.active, self.config, first=self.round == 0)
        voter = given.fresh()
        voter.fit(found, epochs=self.config.voter_epochs, draw=given.draw)
        logits = voter.judge(given.rows)
        self.counts[np.arange(len(self.counts)), logits.argmax(dim=1).cpu().numpy()] += 1
        self.losses += functional.cross_entropy(logits, given.targets, reduction="none").cpu().numpy()
        self.round += 1
        if self.round == self.config.rounds or is_too_small(given, self.active, self.config):
            self.repeat, self.round, self.active = self.repeat + 1, 0, given.rows

    def state(self) -> State:
        """Return all that a later run needs to go on from here."""
        return {
            "place": np.array([self.repeat, self.round]),
            "counts": self.counts,
            "losses": self.losses,
            "active": self.active.cpu().numpy(),
            **self.given.state(),
        }


def compatible_sets(given: LabelledSet, config: IsplConfig) -> Iterator[Int64[torch.Tensor, " s"]]:
    """Yield sets of rows that predict themselves best, one after another from what is left."""
    active = given.rows
    for number in range(config.rounds):
        if number and is_too_small(given, active, config):
            return
        found, active = next_set(given, active, config, first=number == 0)
        yield found


def is_too_small(given: LabelledSet, active: Int64[torch.Tensor, " a"], config: IsplConfig) -> bool:
    """Tell whether so few rows are left that no set is looked for among them."""
    return len(active) <= max(config.fewest * len(given.rows), given.classes)


def next_set(
    given: LabelledSet, active: Int64[torch.Tensor, " a"], config: IsplConfig, *, first: bool
) -> tuple[Int64[torch.Tensor, " s"], Int64[torch.Tensor, " r"]]:
    """Return the set among the active rows that predicts itself best, and the rows that are left."""
    share = min(1.0, config.share * len(given.rows) / len(active))
    found = _find_set(given, active, share, config, first=first)
    left = torch.ones(len(given.rows), dtype=torch.bool, device=active.device)
    left[found] = False
    return found, active[left[active]]


def _find_set(
    given: LabelledSet, active: Int64[torch.Tensor, " a"], share: float, config: IsplConfig, *, first: bool
) -> Int64[torch.Tensor, " s"]:
    """Algorithm 1: return the rows of a set of about `share` of the active ones, all of one kind if it succeeds."""
    learner, smoothed, kept = given.fresh(), torch.zeros(len(active), device=active.device), active
    iterations = iterations_of(share)
    for iteration in range(iterations):
        if iteration == 0:
            rows, epochs = _sample(given, kept, 0.5) if first else kept, config.warmup_epochs
        else:
            rows, epochs = _sample(given, kept, config.expansion), config.epochs
        learner.fit(rows, epochs=epochs, draw=given.draw)
        losses = learner.losses(active)
        losses = torch.nan_to_num(losses, nan=float(losses.nanmean()), posinf=1e4)
        smoothed = config.momentum * smoothed + (1 - config.momentum) * losses
        kept = active[_trim(smoothed, given.targets[active], beta(iteration, iterations, share))]
    return kept


def _sample(given: LabelledSet, rows: Int64[torch.Tensor, " s"], part: float) -> Int64[torch.Tensor, " t"]:
    """Return a random part of each class of rows, at least two samples where it has as many."""
    chosen = []
    for label in range(given.classes):
        mine = rows[given.targets[rows] == label]
        count = min(len(mine), max(2, round(part * len(mine))))
        chosen.append(mine[torch.randperm(len(mine), generator=given.draw, device=rows.device)[:count]])
    return torch.cat(chosen)


def _trim(
    losses: Float32[torch.Tensor, " a"], targets: Int64[torch.Tensor, " a"], part: float
) -> Bool[torch.Tensor, " a"]:
    """Mark the part of lowest losses, and of every class an eighth of that part, lest one be left out."""
    kept = losses <= _quantile(losses, part)
    for label in targets.unique():
        mine = targets == label
        kept |= mine & (losses <= _quantile(losses[mine], part / 8))
    return kept


def _self_train(given: LabelledSet, kept: Bool[np.ndarray, " n"], config: IsplConfig) -> Float32[np.ndarray, " n"]:
    """Train on what is kept, again and again on what the model agrees with; return the smoothed agreement."""
    learner, rows = given.fresh(), given.rows[torch.from_numpy(kept).to(given.rows.device)]
    agreement = torch.full((len(given.rows),), 0.5, dtype=torch.float64, device=given.rows.device)
    momentum = config.self_momentum
    for _ in range(config.self_rounds):
        learner.fit(rows, epochs=config.self_epochs, draw=given.draw)
        agrees = learner.judge(given.rows).argmax(dim=1) == given.targets
        agreement = momentum * agreement + (1 - momentum) * agrees
        rows = given.rows[agreement > 0.5]
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
