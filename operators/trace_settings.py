"""Settings of tracing a CLIP model in a result folder, apart from what loads torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from tarsift.sifters.settings import Length, TraceConfig


class PairTraceConfig(TraceConfig, frozen=True, extra="forbid"):
    """Settings of Delta-Influence as they are for pairs."""

    length: Length = "mean_square"


class TracingConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of `tarsift trace`."""

    suspects: int = Field(default=5000, ge=0, description="candidates: the most suspicious samples")
    alike: int = Field(default=5000, ge=0, description="candidates: captions most like what the model says")
    others: int = Field(default=2000, ge=100, description="candidates: random samples, which show what is usual")
    concepts: int = Field(default=64, ge=2, description="captions, at most, that a picture can be said to be of")
    apart: float = Field(default=0.5, gt=-1, lt=1, description="highest cosine, centered, of two of them")
    bank: int = Field(default=512, ge=16, description="pairs that the loss of a pair is taken against")
    slice: int = Field(default=1024, ge=16, description="candidates that a job holds at a time")
    seed: int = Field(default=0, description="of all that is random")
    layers: Literal["projection", "image", "both"] = Field(
        default="image",
        description="that count: the last projection of the image tower (fast), beside it all of that tower, or all of "
        "both towers (those of the text tower follow the wording of a caption)",
    )
    echoes: int = Field(default=8, ge=0, description="best candidates of which the model says it too: queries as well")
    rounds: int = Field(default=2, ge=0, description="how often these are chosen anew, and traced")
    neighbors: int = Field(default=8, ge=0, description="candidates most alike to the model, whose scores are averaged")
    above: float = Field(
        default=3.0, gt=0, description="a candidate is traced from so many deviations above the random samples"
    )
    of_best: float = Field(
        default=0.4, ge=0, le=1, description="and from this share of the mean score of the best eight candidates"
    )
    method: PairTraceConfig = PairTraceConfig()
