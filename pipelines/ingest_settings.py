"""Settings of nightly ingestion, beside those of each night's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tarsift.clip_detect.drift import DriftConfig
from tarsift.operators.errors import ConfigError
from tarsift.pipelines.config import CleanConfig, parse_config
from tarsift.pipelines.findings import FindingConfig
from tarsift.pipelines.train_settings import LR, PretrainConfig, TrainConfig

SET_EACH_NIGHT = ("model", "base", "epochs", "steps", "seed", "losses", "leave_out", "read", "images")


class IngestConfig(BaseModel):
    """All settings of `tarsift ingest`, beside those of each night's `clean`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: CleanConfig = Field(default=CleanConfig(), description="settings of each night's run, as of `tarsift clean`")
    train: bool = Field(
        default=True, description="train the detect encoder further each night; false: encoders stand still"
    )
    epochs: int = Field(default=8, ge=1, description="passes over tonight's and the replayed samples in a night")
    replay: float = Field(
        default=1.0, ge=0, description="standing samples that are trained on again, per sample of tonight"
    )
    refit: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="where encoders stand still: share of the standing reference that is new since rules were fitted, "
        "at which they are fitted again",
    )
    keep: int = Field(default=30, ge=1, description="nights whose embeddings and encoder are kept")
    pretrain: PretrainConfig = Field(
        default=PretrainConfig(train=TrainConfig(lr=LR)), description="further settings of the training"
    )
    drift: DriftConfig = DriftConfig()
    findings: FindingConfig = FindingConfig()

    @field_validator("pretrain")
    @classmethod
    def _left_alone(cls, pretrain: PretrainConfig) -> PretrainConfig:
        if pretrain.train.lr is None:  # at the rate of further training a night's poison is not learned in the night
            pretrain = pretrain.model_copy(update={"train": pretrain.train.model_copy(update={"lr": LR})})
        if wrong := sorted(pretrain.model_fields_set & set(SET_EACH_NIGHT)):
            raise ValueError(f"{', '.join(wrong)}: set each night, and cannot be given")
        return pretrain


def parse_ingest_config(content: Mapping[str, Any]) -> IngestConfig:
    """Check a plain mapping: `ingest` holds the settings of ingestion, all others are those of `clean`.

    Raises:
        ConfigError: one line per problem.
    """
    own = dict(content.get("ingest") or {})
    rest = {name: value for name, value in content.items() if name != "ingest"}
    try:
        return IngestConfig.model_validate({**own, "clean": parse_config(rest)})
    except ValidationError as error:
        lines = [f"ingest.{'.'.join(map(str, p['loc']))}: {p['msg']}, got {p['input']!r}" for p in error.errors()]
        raise ConfigError("; ".join(lines)) from None
