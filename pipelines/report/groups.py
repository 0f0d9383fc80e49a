"""What flagged samples have in common: a look, a caption, a word.

A group is no verdict. It is a place to look first: many flagged samples that share something, and
few that share it and are not flagged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from tarsift.pipelines.report.folds import normalise, words_of
from tarsift.pipelines.report.looks import SMALLEST, TIGHT, Look, looks
from tarsift.pipelines.report.rows import Rows

Kind = Literal["look", "caption", "word"]
KINDS: tuple[Kind, ...] = ("look", "word", "caption")

# What a shared caption or word must show to be listed: chance would hardly give it, and it is no mere shade.
LEAST_Z = 4.0
LEAST_ODDS = 2.0
LEAST_COPIES = 3  # of a caption
MOST_NAMES = 5000
# Words of which most samples also have a stronger word are put under that one.
OVERLAP = 0.8


@dataclass(frozen=True)
class Group:
    """Samples that share something.

    `members` are positions in the rows looked at, highest score first. `total` samples of the dump
    share it, `flagged` of them are flagged. `reach`: nineteen in twenty of the members are among
    this fraction of highest scores. `strength` orders groups of one kind.
    """

    kind: Kind
    title: str
    members: tuple[int, ...]
    look: Look | None = None
    total: int = 0
    flagged: int = 0
    reach: float = 0.0
    strength: float = 0.0
    along: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of those who have it that is flagged."""
        return self.flagged / max(1, self.total)


def find_candidates(top: Rows, background: Rows, *, threads: int = 1) -> dict[Kind, list[Group]]:
    """Find what repeats among the flagged of the rows looked at; how often the dump has it is not known yet."""
    suspects = np.flatnonzero(top.flagged)
    found: dict[Kind, list[Group]] = {"look": [], "word": [], "caption": []}
    if top.images is not None and background.images is not None:
        found["look"] = _look_groups(top, background, suspects.tolist(), threads)
    normal = normalise(pa.array([top.captions[i] for i in suspects], pa.string()))
    found["caption"] = _named("caption", top, suspects, np.arange(len(normal)), normal, LEAST_COPIES)
    found["word"] = _named("word", top, suspects, *words_of(normal), SMALLEST)
    return found


def _look_groups(top: Rows, background: Rows, suspects: list[int], threads: int) -> list[Group]:
    """Group suspects by look: each image is compared once, its copies join it afterwards."""
    if top.images is None or background.images is None:
        return []
    once = first_of_each(top.digests, suspects)
    names = {i: top.digests[i] or i for i in suspects}  # an image without a digest stands for itself
    copies: dict[bytes | int, list[int]] = {}
    for i in suspects:
        copies.setdefault(names[i], []).append(i)
    texts = None if top.texts is None else (top.texts[0][once], top.texts[1][once])
    found = looks(top.images[once], background.images, texts=texts, background_texts=background.texts, threads=threads)
    groups = []
    for look in found:
        members = [i for m in look.members for i in copies[names[once[m]]]]
        groups.append(Group("look", "", _ranked(top, members), look))
    return groups


def _named(kind: Kind, top: Rows, suspects: np.ndarray, at: np.ndarray, names: pa.Array, least: int) -> list[Group]:
    """Group suspects by name: `names[j]` belongs to suspect `at[j]`."""
    members: dict[str, list[int]] = {}
    for position, name in zip(at.tolist(), names.to_pylist(), strict=True):
        if name:
            members.setdefault(name, []).append(int(suspects[position]))
    common = sorted((-len(of), name) for name, of in members.items() if len(of) >= least)[:MOST_NAMES]
    return [Group(kind, name, _ranked(top, members[name])) for _, name in common]


def _ranked(top: Rows, members: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    return tuple(sorted((int(i) for i in members), key=lambda i: (-top.scores[i], top.identities[i])))


def first_of_each(digests: Sequence[bytes | None], positions: Sequence[int]) -> list[int]:
    """Return the positions whose image has not come before among them."""
    seen: set[bytes] = set()
    out = []
    for i in positions:
        digest = digests[i]
        if digest is None or digest not in seen:
            out.append(i)
            if digest is not None:
                seen.add(digest)
    return out


def reach_levels(candidates: dict[Kind, list[Group]], scores: Float32[np.ndarray, " n"]) -> dict[Kind, np.ndarray]:
    """Return, per candidate, the score that nineteen in twenty of its members reach."""
    return {
        kind: np.array([np.quantile(scores[list(g.members)], 0.05, method="lower") for g in groups], np.float32)
        for kind, groups in candidates.items()
    }


def rank_groups(
    candidates: dict[Kind, list[Group]],
    counts: dict[Kind, np.ndarray],
    reached: dict[Kind, np.ndarray],
    scores: Float32[np.ndarray, " n"],
    *,
    middle: float,
    judged: int,
    flagged: int,
    most: int,
) -> dict[Kind, list[Group]]:
    """Keep and order what stands out in the whole dump.

    A group's strength is the number of its flagged samples beyond the expected, times the share that
    is flagged, times how far its median score is above that of the dump; for a look, times its
    tightness (up to 3). A rare but natural subject can be as tight as a campaign: its scores are lower.

    Args:
        candidates: of each kind.
        counts: (n, 2) per kind: samples that share it, and flagged ones of them.
        reached: (n,) per kind: samples that score at least the group's reach level.
        scores: of the rows looked at.
        middle: median score of the dump.
        judged: samples with a verdict in the whole dump.
        flagged: flagged ones of them.
        most: groups kept per kind.
    """
    share = flagged / max(1, judged)
    ranked: dict[Kind, list[Group]] = {}
    for kind, groups in candidates.items():
        known = []
        for group, (total, of_them), above in zip(groups, counts[kind].tolist(), reached[kind].tolist(), strict=True):
            force = (of_them - share * total) * of_them / max(1, total)
            force *= min(group.look.tightness, TIGHT) if group.look else 1.0
            force *= max(0.0, float(np.median(scores[list(group.members)])) - middle)
            if force > 0 and (kind == "look" or _stands_out(total, of_them, share)):
                known.append(replace(group, total=total, flagged=of_them, reach=above / max(1, judged), strength=force))
        known.sort(key=lambda g: (-g.strength, g.title, g.members))
        ranked[kind] = (_under_stronger(known) if kind == "word" else known)[:most]
    return ranked


def _stands_out(total: int, flagged: int, share: float) -> bool:
    if share >= 1:
        return False
    z = (flagged - share * total) / math.sqrt(max(total * share * (1 - share), 1e-9))
    odds = (flagged / max(total - flagged, 0.5)) / max(share / (1 - share), 1e-12)
    return z >= LEAST_Z and odds >= LEAST_ODDS


def _under_stronger(words: list[Group]) -> list[Group]:
    """Put words that come with a stronger word under it, in `along`."""
    leading: list[tuple[Group, set[int], list[str]]] = []
    for word in words[:500]:
        mine = set(word.members)
        above = next((entry for entry in leading if len(mine & entry[1]) >= OVERLAP * len(mine)), None)
        if above is None:
            leading.append((word, mine, []))
        else:
            above[2].append(word.title)
    return [replace(word, along=tuple(along)) for word, _, along in leading]


def captions_of(rows: Rows, group: Group) -> Counter[str | None]:
    """Count the captions of a group's members."""
    return Counter(rows.captions[i] for i in group.members)
