"""Attacks on a labelled set of pictures, for measuring sifters: (images, labels) to a poisoned set and its truth.

`ATTACKS` holds them by name, `poison_set` carries one out. An attack relabels the samples that it chooses, or keeps
their labels; it changes their pictures one by one, or plants a *trigger*: one change for all pictures, which at test
time makes a model take other pictures for a class as well.

Rates here are shares of the whole set. Papers give shares of other things: which, `Attack.rate_of` says, and `as_rate`
converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8

from tarsift.sifters.ispl import compatible_sets
from tarsift.sifters.perturbations import Model, collide, match_gradient, raise_loss
from tarsift.sifters.result import check_labels
from tarsift.sifters.settings import IsplConfig
from tarsift.sifters.training import LabelledSet
from tarsift.sifters.triggers import (
    SHAPES,
    MakeTrigger,
    Trigger,
    checkered_corners,
    coloured_ring,
    coloured_square,
    four_pixels,
    letter,
    small_shape,
    smooth_field,
    white_square,
    whole_noise,
)

NONE = -1  # no class: a sample that is left alone, test pictures that are not aimed at
SMALLEST = 16  # pixels of a side


@dataclass(frozen=True)
class Aim:
    """The number of classes, the class an attack aims at and the one whose samples it poisons; NONE: not told."""

    classes: int
    target: int
    source: int


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned set, its truth, and how to tell whether a model has learned the attack.

    images, labels: as given but for the poisoned rows. poison: which these are. targets: by class, what its test
    pictures are to be taken for; NONE for classes that are not aimed at. trigger: plants in test pictures what was
    planted in the set; None where there is none.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int64[np.ndarray, " n"]
    poison: Bool[np.ndarray, " n"]
    targets: Int64[np.ndarray, " c"]
    trigger: Trigger | None

    def success(self, guesses: Int64[np.ndarray, " m"], labels: Int64[np.ndarray, " m"]) -> float:
        """Return how many of the test pictures aimed at are taken for the target: 0 to 1, NaN if none are.

        This is ISPL's targeted misclassification rate if what was guessed at are pictures with the trigger.
        """
        wanted = self.targets[labels]
        aimed = wanted != NONE
        return float((guesses[aimed] == wanted[aimed]).mean()) if aimed.any() else math.nan


# Labels: from what they are to what the attack makes of them, NONE for samples that it leaves alone.
Relabelling = Callable[[Int64[np.ndarray, " n"], Aim, np.random.Generator], Int64[np.ndarray, " n"]]


def one_to_one(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Samples of the source become the target."""
    return np.where(labels == aim.source, aim.target, NONE)


def all_to_one(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Samples of every other class become the target."""
    return np.where(labels != aim.target, aim.target, NONE)


def all_to_all(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Samples of each class become the next one, and of the last the first."""
    return (labels + 1) % aim.classes


def to_another(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Samples become any other class."""
    return (labels + draw.integers(1, aim.classes, len(labels))) % aim.classes


def label_kept(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Samples of the target stay what they are."""
    return np.where(labels == aim.target, labels, NONE)


def not_aimed(labels: Int64[np.ndarray, " n"], aim: Aim, draw: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """No class is aimed at."""
    return np.full(len(labels), NONE, np.int64)


@dataclass(frozen=True)
class Attack:
    """A way to poison a labelled set.

    Attributes:
        needs: what `poison_set` must be told: of `target`, `source`, `model` and `victim`.
        rate_of: what the papers' rate is a share of: `all` samples; those of the `source`; those of a `class` of mean
            size; or those that bear the label of the `target` afterwards, poison included.
        relabel: which samples may be poisoned, and what they become.
        taken_for: what test pictures of each class are to be taken for.
        trigger: makes the trigger. perturb: changes pictures one by one, before they get the trigger.
        strength: what is used unless another is given, the published one where there is one; None: nothing to set.
    """

    description: str
    paper: str
    needs: tuple[str, ...]
    rate_of: Literal["all", "source", "class", "target"]
    relabel: Relabelling
    taken_for: Relabelling
    trigger: MakeTrigger | None = None
    perturb: Callable[..., UInt8[np.ndarray, "n h w 3"]] | None = None
    strength: float | None = None

    @property
    def labels(self) -> Literal["clean", "dirty"]:
        """Whether poisoned samples keep their labels or get another."""
        return "clean" if self.relabel is label_kept else "dirty"


ISPL, META_SIFT = "Jin et al. 2023 (arXiv 2105.03692)", "Zeng et al. 2023 (arXiv 2302.06279)"
DELTA_INFLUENCE = "Li et al. 2024 (arXiv 2411.13731)"
BADNETS, TROJAN = "Gu et al. 2017 (arXiv 1708.06733)", "Liu et al. 2018 (NDSS, Trojaning Attack on Neural Networks)"
_DLBD_FORMS = {
    "": ("one class is taken for another", ("target", "source"), "source", one_to_one),
    "_all_to_one": ("all are taken for one class", ("target",), "class", all_to_one),
    "_all_to_all": ("each class is taken for the next", (), "all", all_to_all),
}

ATTACKS: dict[str, Attack] = {
    "badnets": Attack(
        "a white square at the bottom right: all are taken for one class", f"{META_SIFT}; {BADNETS}",
        ("target",), "target", all_to_one, all_to_one, white_square,
    ),
    "badnets_all_to_all": Attack(
        "a white square at the bottom right: each class is taken for the next", f"{META_SIFT}; {BADNETS}",
        (), "all", all_to_all, all_to_all, white_square,
    ),
    "trojan_square": Attack(
        "a square of many colours at the bottom right: all are taken for one class", f"{META_SIFT}; {TROJAN}",
        ("target",), "target", all_to_one, all_to_one, coloured_square,
    ),
    "trojan_watermark": Attack(
        "a faint ring over the picture: all are taken for one class", f"{META_SIFT}; {TROJAN}",
        ("target",), "target", all_to_one, all_to_one, coloured_ring, strength=0.3,
    ),
    **{
        f"dlbd_{shape}{form}": Attack(
            f"a small shape ({shape}) of one colour: {what}", ISPL,
            needs, rate_of, relabel, relabel, partial(small_shape, shape=shape),
        )
        for shape in SHAPES
        for form, (what, needs, rate_of, relabel) in _DLBD_FORMS.items()
    },
    "watermark": Attack(
        "a letter at the upper left, nearly opaque: one class is taken for another", ISPL,
        ("target", "source"), "source", one_to_one, one_to_one, letter, strength=0.8,
    ),
    "blended_noise": Attack(
        "noise mixed into the whole picture: all are taken for one class",
        f"{META_SIFT}; Chen et al. 2017 (arXiv 1712.05526)",
        ("target",), "target", all_to_one, all_to_one, whole_noise, strength=0.2,
    ),
    "smooth": Attack(
        "low frequencies added: all are taken for one class", f"{META_SIFT}; Zeng et al. 2021 (arXiv 2104.03413)",
        ("target",), "target", all_to_one, all_to_one, smooth_field, strength=0.1,
    ),
    "targeted_flip": Attack(
        "samples of one class under the label of another", META_SIFT,
        ("target", "source"), "target", one_to_one, one_to_one,
    ),
    "random_flip": Attack("samples under any other label", META_SIFT, (), "all", to_another, not_aimed),
    "poison_frogs": Attack(
        "samples that look to a model like one victim: it is to be taken for their class",
        f"{META_SIFT}; Shafahi et al. 2018 (arXiv 1804.00792)",
        ("target", "model", "victim"), "target", label_kept, not_aimed, perturb=collide, strength=0.3,
    ),
    "four_pixels": Attack(
        "four black pixels near the bottom right: one class is taken for another", f"{DELTA_INFLUENCE}; {BADNETS}",
        ("target", "source"), "all", one_to_one, one_to_one, four_pixels,
    ),
    "gradient_matching": Attack(
        "samples that train a model as one victim under their label would: it is to be taken for their class",
        f"{DELTA_INFLUENCE}; Geiping et al. 2021 (ICLR, arXiv 2009.02276)",
        ("target", "model", "victim"), "all", label_kept, not_aimed, perturb=match_gradient, strength=16 / 255,
    ),
    "label_consistent": Attack(
        "samples made hard to recognise, with checkered corners: all are taken for their class",
        f"{ISPL}; Turner et al. 2019 (arXiv 1912.02771)",
        ("target", "model"), "target", label_kept, all_to_one, checkered_corners, perturb=raise_loss, strength=8 / 255,
    ),
}  # fmt: skip


def poison_set(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int64[np.ndarray, " n"],
    attack: str = "badnets",
    *,
    rate: float,
    seed: int,
    target: int | None = None,
    source: int | None = None,
    strength: float | None = None,
    model: Model | None = None,
    victim: UInt8[np.ndarray, "h w 3"] | None = None,
    strata: Int64[np.ndarray, " n"] | None = None,
) -> PoisonedSet:
    """Poison a share of a labelled set; what is given is not changed.

    The same seed gives the same set. The trigger is the same at every rate.

    Args:
        images: of 16 pixels and more.
        labels: 0 and up; the highest one tells how many classes there are.
        attack: in `ATTACKS`, which says for each what it `needs`; what it does not need must not be given.
        rate: share of all samples that are poisoned. For a paper's rate see `as_rate`.
        target: class that is aimed at; that of the poisoned samples where labels are kept.
        source: class that is to be taken for the target.
        strength: 0 to 1, of the trigger, or of what is done to single pictures; None: that of `ATTACKS`.
        model: pictures 0 to 1 (b, 3, h, w) to logits (`label_consistent`; `gradient_matching`, a network) or features
            (`poison_frogs`).
        victim: the test picture that is to be taken for the target (`poison_frogs`, `gradient_matching`).
        strata: groups to draw from in proportion to their sizes; None: the classes. What `ispl_partition` returns for
            the clean set makes the adaptive attacker of ISPL's appendix D.2.3.

    Raises:
        ValueError: no such attack, arguments that do not fit it or each other, or too few samples for the rate.
    """
    spec = _checked_spec(attack, strength, target=target, source=source, model=model, victim=victim)
    _check_pictures(images, victim)
    check_labels(labels, len(images))
    labels = labels.astype(np.int64)
    aim = _checked_aim(int(labels.max()) + 1, target, source)
    strength = (spec.strength if strength is None else strength) or 0.0
    relabelling, shaping, choosing, perturbing = (np.random.default_rng([seed, 1708, i]) for i in range(4))
    changed = spec.relabel(labels, aim, relabelling)
    rows = _choose(changed, labels if strata is None else strata, rate, choosing)
    _, height, width, _ = images.shape
    trigger = spec.trigger(height, width, strength, shaping) if spec.trigger else None
    pictures = images[rows]
    if spec.perturb:
        pictures = spec.perturb(pictures, labels[rows], model=model, victim=victim, strength=strength, draw=perturbing)
    out, poison = images.copy(), np.zeros(len(images), bool)
    out[rows], poison[rows] = trigger(pictures) if trigger else pictures, True
    targets = spec.taken_for(np.arange(aim.classes), aim, relabelling)
    return PoisonedSet(out, np.where(poison, changed, labels), poison, targets, trigger)


def as_rate(
    attack: str,
    share: float,
    labels: Int64[np.ndarray, " n"],
    *,
    target: int | None = None,
    source: int | None = None,
) -> float:
    """Return what share of the whole set a paper's rate is: ISPL's of the source, Meta-Sift's in the target class.

    share: of what `Attack.rate_of` says. With it `poison_set` makes as many samples poisoned as the paper has: of
    10 classes of 5,000, a third of the target's samples are 2,500, 5 % of all; 10 % of the source are 500, 1 %.

    Raises:
        ValueError: no such attack, a share that is not between 0 and 1, or the class that it refers to is not given.
    """
    spec = _spec(attack)
    if not 0 < share < 1:
        raise ValueError(f"`share` must lie between 0 and 1: got {share:g}.")
    if spec.rate_of == "all":
        return share
    if spec.rate_of == "class":
        return share / (int(labels.max()) + 1)
    label = target if spec.rate_of == "target" else source
    if label is None:
        raise ValueError(f"the rate of attack {attack!r} is a share of the {spec.rate_of}: give `{spec.rate_of}`.")
    size = float(np.mean(labels == label))
    return size * share / (1 - share) if spec.rate_of == "target" and spec.labels == "dirty" else size * share


def ispl_partition(
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    *,
    config: IsplConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Int64[np.ndarray, " n"]:
    """Return into which of its sets ISPL takes apart a set, the rest as the last; arguments as those of `ispl`.

    An attacker who knows the defence, and draws poison from each of them, spreads it over all (appendix D.2.3).
    """
    config = config or IsplConfig()
    given = LabelledSet(images, labels, network=config.network, fit=config.fit, seed=seed, device=device)
    parts = np.full(len(labels), config.rounds)
    for number, found in enumerate(compatible_sets(given, config)):
        parts[found.cpu().numpy()] = number
    return parts


def _spec(attack: str) -> Attack:
    if attack not in ATTACKS:
        raise ValueError(f"there is no attack {attack!r}: choose one of {', '.join(ATTACKS)}.")
    return ATTACKS[attack]


def _checked_spec(attack: str, strength: float | None, **given: object) -> Attack:
    """Return the attack's entry, if it has been given what it needs and nothing else."""
    spec = _spec(attack)
    for name, value in given.items():
        if (name in spec.needs) != (value is not None):
            raise ValueError(f"attack {attack!r} {'needs' if name in spec.needs else 'has no use for'} `{name}`.")
    if strength is not None and spec.strength is None:
        raise ValueError(f"attack {attack!r} has no use for `strength`.")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"`strength` must be above 0 and at most 1: got {strength:g}.")
    return spec


def _checked_aim(classes: int, target: int | None, source: int | None) -> Aim:
    for name, label in (("target", target), ("source", source)):
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"`{name}` must be a class, 0 to {classes - 1}: got {label}.")
    if target is not None and target == source:
        raise ValueError(f"`source` and `target` must differ: both are {target}.")
    return Aim(classes, *(NONE if label is None else label for label in (target, source)))


def _check_pictures(images: np.ndarray, victim: np.ndarray | None) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"`images` must be uint8 (n, height, width, 3) of {SMALLEST} pixels and more: "
            f"got {images.dtype} {images.shape}."
        )
    if victim is not None and (victim.dtype != np.uint8 or victim.shape != images.shape[1:]):
        raise ValueError(f"`victim` must be uint8 {images.shape[1:]}: got {victim.dtype} {victim.shape}.")


def _choose(
    changed: Int64[np.ndarray, " n"], strata: Int64[np.ndarray, " n"], rate: float, draw: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """Draw rows at random of those that may be poisoned, of each stratum in proportion, to less than one row."""
    if strata.shape != changed.shape:
        raise ValueError(f"`strata` must be one group per sample, {changed.shape}: got {strata.shape}.")
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must lie between 0 and 1, as a share of all samples: got {rate:g}.")
    rows, count = draw.permutation(np.flatnonzero(changed != NONE)), round(rate * len(changed))
    if not 1 <= count <= len(rows):
        raise ValueError(
            f"a `rate` of {rate:g} is {count} of {len(changed)} samples, and this attack can poison 1 to {len(rows)}."
        )
    rows = rows[np.argsort(strata[rows], kind="stable")]
    evenly = (np.arange(count) * len(rows) + draw.integers(len(rows))) // count
    return np.sort(rows[evenly])
