"""Which side of the pairs each encoder may judge, decided by what the encoder check says of it.

The density of images needs an encoder that was trained on the dump: no other has learned what was planted. How
well captions fit needs one that was not: the other has learned that they fit. A role is what the user says an
encoder is; the check has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tarsift.operators.errors import UsageError
from tarsift.operators.regime import RegimeCode

DETECT, WITNESS, FEATURES = "detect", "witness", "features"
ROLES = (DETECT, WITNESS, FEATURES)  # the last gives sifters their features, and judges nothing itself


@dataclass(frozen=True)
class Sides:
    """By whose embeddings each side is scored, and which sides the verdict `suspicion` is made from.

    Attributes:
        density: role whose image embeddings are rated by their density; None: there is none.
        captions: role that tells how badly a caption fits; None: there is none.
        judges: `density`, `captions` or both.
        looked_for, not_looked_for: what the verdict covers, and what it does not, in words.
    """

    density: str | None
    captions: str | None
    judges: tuple[str, ...]
    looked_for: tuple[str, ...]
    not_looked_for: tuple[str, ...]

    @property
    def first(self) -> str:
        """The role whose rows say which samples there are."""
        role = self.density or self.captions
        assert role is not None  # one of the two is there
        return role

    @property
    def second_look(self) -> str | None:
        """Role that says whether images that lie together are alike; None: nobody does."""
        return self.captions if self.captions != self.density and "density" in self.judges else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `run.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Sides:
        """Rebuild them from `to_json`, or from what JSON has made of that."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**values)


TRIGGERS = "triggers that the encoder has learned, whatever the captions say"
MISFITS = "captions that do not fit their images, at any rate"


def choose_sides(regimes: Mapping[str, RegimeCode | None]) -> Sides:
    """Decide who judges what.

    Args:
        regimes: per role that has an encoder, what the check found; None where it was not made yet, which
            takes the role at its word.

    Raises:
        UsageError: if nothing can be judged.
    """
    density = DETECT if DETECT in regimes else None
    learned = density is not None and regimes[DETECT] != "not_trained_on_this_dump"
    is_witness = WITNESS in regimes and regimes[WITNESS] in (None, "not_trained_on_this_dump", "unknown")
    captions = WITNESS if is_witness else DETECT if density and not learned else None
    judges = (*(("density",) if learned else ()), *(("captions",) if captions else ()))
    if not judges:
        raise UsageError(
            "the encoder given as witness was trained on this dump, and has learned that its captions fit: "
            "give it as --encoder detect=..., or a witness that never saw these shards."
        )
    not_looked_for = ["triggers that the encoder has not learned, or takes for a subject of its own"]
    if not learned:
        not_looked_for = [f"{TRIGGERS}: that takes an encoder trained on this dump (--encoder detect=...)"]
    if not captions:
        not_looked_for.append(f"{MISFITS}: that takes an encoder that never saw it (--encoder witness=...)")
    looked_for = (*((TRIGGERS,) if learned else ()), *((MISFITS,) if captions else ()))
    return Sides(density, captions, judges, looked_for, tuple(not_looked_for))
