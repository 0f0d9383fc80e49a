"""Settings of repairing a CLIP, apart from what loads torch."""

from __future__ import annotations

from pydantic import BaseModel, Field

from tarsift.sifters.settings import UnlearnConfig


class PairUnlearnConfig(UnlearnConfig, frozen=True, extra="forbid"):
    """Settings of unlearning as they are for pairs."""

    batch_size: int = Field(default=128, ge=2, description="samples of a step, all of them where there are fewer")
    steps: int = Field(default=300, ge=1, description="scrub, badt: steps")
    augmented: bool = Field(default=False, description="train on mirrored and shifted copies; off if the model was not")
    rate: float = Field(default=0.005, gt=0, description="badt: highest learning rate")


class RepairConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of `tarsift repair`.

    `above` lies lower than what a trace calls traced: clean samples that are forgotten cost little, and some of the
    poison that stays can be enough.
    """

    above: float = Field(
        default=3.0,
        gt=0,
        description="candidates of a trace are forgotten from so many deviations above the random ones",
    )
    epochs: int = Field(default=5, ge=1, description="cf: passes over the retained pairs; eu trains as it was trained")
    lr: float | None = Field(default=None, gt=0, description="cf: highest learning rate; None = as `pretrain --from`")
    retained: int = Field(default=10_000, ge=2, description="ssd, scrub, badt, ibau: random retained pairs in memory")
    held: int = Field(default=1000, ge=10, description="pairs on which retrieval is measured")
    seed: int = Field(default=0, description="of all that is random")
    unlearn: PairUnlearnConfig = PairUnlearnConfig()
