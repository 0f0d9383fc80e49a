"""Settings of routing and sifting as a part of the main job, apart from what loads torch."""

from __future__ import annotations

from pydantic import BaseModel, Field

from tarsift.sifters.settings import RoutingConfig, SifterConfig

# What became of a sample, or of a class.
SIFT_STATUS = {
    "sifted": "judged by the sifter",
    "unrouted": "its caption is like no class",
    "too_small": "its class has one sample",
    "mostly_duplicates": "most of its class are images that occur more than once: look at them yourself",
    "mostly_suspects": "most of its class are suspects by density: a sifter would take them for what is normal there",
    "over_budget": "other classes have more suspects, and the budget was spent on them",
    "failed": "its problem failed, or its image could not be used",
}


class SiftConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of routing and sifting."""

    enabled: bool = Field(default=False, description="route and sift inside `clean`, and judge by both")
    route: str = Field(
        default="captions", description="classes by `captions` (clusters), `cls` (numbers in .cls), or a file of names"
    )
    names_sha256: str | None = Field(
        default=None, description="of the names in that file; put here by the run, which they must not change under"
    )
    budget: int | None = Field(default=None, ge=1, description="problems at most; None = as many as there are")
    suspect_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="most suspicious part by density, whose classes come first"
    )
    most_suspects: float = Field(
        default=0.5, gt=0, le=1, description="a class with a larger part of suspects is reported, not sifted"
    )
    most_duplicates: float = Field(
        default=0.5, gt=0, le=1, description="a class with a larger part of repeated images is reported, not sifted"
    )
    picture_size: int = Field(default=32, ge=16, description="pixels of a side, for networks on pictures")
    memory_gb: float = Field(default=4.0, gt=0, description="that the samples of a problem may take in a job")
    weight: float = Field(default=0.5, ge=0, description="of a sifter's verdict in `suspicion_sifted`")
    seed: int = Field(default=0, description="of all that is random")
    routing: RoutingConfig = RoutingConfig()
    method: SifterConfig = SifterConfig()

    @property
    def names_file(self) -> str | None:
        """The file of class names; None where classes are clusters or labels."""
        return None if self.route in ("captions", "cls") else self.route
