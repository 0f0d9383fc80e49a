"""Settings of a training of a CLIP."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.shards import ReadConfig

LR, FURTHER_LR = 4e-3, 4e-4


class TrainConfig(BaseModel):
    """The optimiser: AdamW, its rate rising linearly and then falling as half a cosine to zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float | None = Field(
        default=None,
        gt=0,
        description=f"highest learning rate; None = {LR}, or {FURTHER_LR} where a `base` is trained further, so that "
        "it keeps what it has learned",
    )
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices and convolutions, not of gains and biases")
    beta2: float = Field(default=0.98, gt=0, lt=1, description="AdamW's second beta")
    warmup_steps: int = Field(default=50, ge=0, description="steps in which the rate rises; a tenth of all at most")
    precision: str = Field(default="auto", pattern="^(auto|fp32|bf16)$", description="auto = bf16 on a GPU, else fp32")


class PretrainConfig(BaseModel):
    """What is trained, on how much, and with which machines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None,
        description="`tiny`, a JSON config of stock towers, or an open_clip name; None = that of `base`, else `tiny`",
    )
    base: str | None = Field(
        default=None,
        description="encoder to train further: enc.pt of `pretrain`, ARCHITECTURE:FILE or ARCHITECTURE:TAG; "
        "None = random weights",
    )
    epochs: int = Field(default=20, ge=1, description="passes over the pairs; only whole batches count")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps, in place of `epochs`")
    batch_size: int = Field(default=128, ge=2, description="pairs per step, over all workers")
    seed: int = Field(default=0, description="of the first weights and of the order of the pairs")
    train: TrainConfig = Field(default=TrainConfig(), description="the optimiser")
    threads: int = Field(default=1, ge=1, description="threads, and CPUs reserved, per worker")
    workers: int = Field(default=1, ge=1, description="processes that train in step")
    gpus_per_worker: float | None = Field(default=None, ge=0, description="None = one where the cluster has GPUs")
    decoders: int = Field(default=0, ge=0, description="processes per worker that decode streamed shards")
    cache_bytes: int = Field(default=2 << 30, ge=0, description="pixels up to this size are kept in memory")
    shuffle: int = Field(default=5000, ge=1, description="pairs in the shuffle buffer of streamed shards")
    snapshot_s: float = Field(
        default=60.0,
        ge=0,
        description="seconds between snapshots from which an interrupted training goes on (streamed shards: at about "
        "the same place); more where writing one takes over a twentieth of that; 0 = after every step",
    )
    losses: str | None = Field(
        default=None, description="Parquet file for the loss of every pair in every epoch (shard, key, losses)"
    )
    leave_out: str | None = Field(
        default=None, description="Parquet file with shard and key of samples that are not trained on"
    )
    read: ReadConfig = Field(default=ReadConfig(), description="where captions are")
    images: ImageConfig = Field(default=ImageConfig(), description="which images are usable")
