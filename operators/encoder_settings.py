"""Which encoder and how it runs: settings and facts, apart from what loads a model, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Tower = Literal["image", "text"]


class EncoderConfig(BaseModel):
    """Which encoder, and how it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Annotated[
        str,
        Field(
            description="enc.pt from `tarsift pretrain`, ARCHITECTURE:FILE, ARCHITECTURE:TAG, hf-hub:ORG/NAME, or "
            "embeddings:FOLDER, those that clip-retrieval made of the dump"
        ),
    ]
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Field(description="of the arithmetic; auto = fp32 on a CPU, fp16 on a GPU (nearer to fp32 than bf16 is)"),
    ] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N; auto = cuda where there is one")] = "auto"
    micro_batch: Annotated[
        int | None,
        Field(ge=1, description="samples per forward pass, always padded to it; None = 64 on a CPU, 256 on a GPU"),
    ] = None
    threads: Annotated[int, Field(ge=1, description="threads of torch in the encoder's process")] = 1
    store: Annotated[Literal["float16", "float32"], Field(description="type of the stored embeddings")] = "float16"
    views: Annotated[
        int | None,
        Field(
            ge=0,
            le=16,
            description="diluted copies of every image that are embedded too, for sifters; None = 3 for the role "
            "`features`, else 0",
        ),
    ] = None
    towers: Annotated[tuple[Tower, ...], Field(min_length=1, description="what is embedded")] = ("image", "text")

    def settled(self, *, gpu: bool, views: int = 0) -> EncoderConfig:
        """Put what `precision=auto`, `micro_batch=None` and `views=None` mean there; embeddings depend on them."""
        precision = self.precision if self.precision != "auto" else "fp16" if gpu else "fp32"
        micro_batch = self.micro_batch or (256 if gpu else 64)
        views = views if self.views is None else self.views
        return self.model_copy(update={"precision": precision, "micro_batch": micro_batch, "views": views})


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder besides its weights.

    `mean` and `std` are per RGB channel, for pixels in 0 to 1. `weights_sha256` is the digest of the weights as they
    were stored, whatever file they came in. `trained_on` maps the shards that the encoder was trained on to their
    SHA-256, None where that is not known; so is `steps`. Where training went on from another encoder, both count what
    that one has seen; `unknown_base` names one that does not say.
    """

    name: str
    weights_sha256: str
    embed_dim: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int
    trained_on: dict[str, str] | None
    steps: int | None
    unknown_base: str | None = None


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split `ARCHITECTURE:WEIGHTS` at its first colon that does not belong to a URL."""
    host = re.match(r"(\w+://[^/]*)?", spec)
    assert host is not None  # it may be empty
    found = re.compile(r":(?!//)").search(spec, host.end())
    return (spec, None) if found is None else (spec[: found.start()], spec[found.end() :])


def is_file_alone(spec: str) -> bool:
    """Tell whether a spec is that of an encoder file, which says what it is, by its name."""
    return spec.endswith(".pt") and split_spec(spec)[1] is None


def rgb(values: Sequence[float | int]) -> tuple[float, float, float]:
    """Return what there must be three of, one for each channel."""
    red, green, blue = values
    return float(red), float(green), float(blue)
