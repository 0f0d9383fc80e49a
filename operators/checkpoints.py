"""Encoder files: weights with the record of what they were trained on, read without running anything.

`torch.load` is only ever called with `weights_only=True`: a file may hold tensors and plain types.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tarsift.operators import storage
from tarsift.operators.errors import TarsiftError, UsageError

CHECKPOINT_FORMAT = "tarsift-encoder"
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What an encoder file holds: the model and the record of what it was trained on."""

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    shards: dict[str, str]
    steps: int
    samples: int
    seed: int
    extra: dict[str, Any]


def save_checkpoint(
    url: str | Path,
    model: torch.nn.Module,
    *,
    config: Mapping[str, Any],
    shards: Mapping[str, str],
    steps: int,
    samples: int,
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoder file that says what it is and what it was trained on.

    Args:
        url: where to, any fsspec URL.
        model: its weights are kept in the precision they have.
        config: the model's JSON config.
        shards: name and SHA-256 of every shard file that was trained on.
        steps: optimiser steps taken.
        samples: image-text pairs seen, repeats included.
        seed: of weights and order.
        extra: more to record; plain types.
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "config": dict(config),
        "state_dict": {k: v.detach().to("cpu").contiguous().clone() for k, v in model.state_dict().items()},
        "shards": dict(shards),
        "steps": steps,
        "samples": samples,
        "seed": seed,
        "extra": dict(extra or {}),
    }
    with storage.open_write(str(url)) as file:
        torch.save(content, file)


def load_checkpoint(url: str | Path) -> Checkpoint:
    """Read an encoder file written by `save_checkpoint`; nothing in it is executed.

    Raises:
        UsageError: if there is no such file.
        TarsiftError: if it is not an encoder file, or damaged.
    """
    content = load_tensors(str(url))
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise TarsiftError(
            f"{url} is not an encoder file of tarsift. For weights from elsewhere give the architecture too, "
            f"as in RN50:{url}."
        )
    if content.get("version") != CHECKPOINT_VERSION:
        raise TarsiftError(
            f"{url} has encoder format {content.get('version')!r}, this version of tarsift reads {CHECKPOINT_VERSION}."
        )
    try:
        return Checkpoint(**{name: content[name] for name in Checkpoint.__dataclass_fields__})
    except KeyError as error:
        raise TarsiftError(f"{url} is an encoder file without {error}: it is damaged. Train it again.") from error


def load_tensors(url: str) -> Any:
    """Read tensors and plain types, and nothing else, from a torch or safetensors file.

    Raises:
        UsageError: if there is no such file.
        TarsiftError: if it is damaged, or holds anything else.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {url!r}.") from error
    try:
        if url.endswith(".safetensors"):
            from safetensors.torch import load

            return load(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch's readers raise almost anything
        reason = str(error).strip().split("\n")[0][:200]
        raise TarsiftError(
            f"{url} cannot be read as a file of tensors: it is damaged, or holds code besides tensors, which tarsift "
            f"never runs (save its state dict alone). torch says: {reason}"
        ) from error


def find_state_dict(content: Any, url: str) -> dict[str, torch.Tensor]:
    """Find the state dict in what a training script saved, whether bare or under one of the usual names."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise TarsiftError(f"{url} holds no state dict: expected a dict of tensors, or one under `state_dict`.")
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def load_weights(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], where: str) -> None:
    """Put weights into a model of exactly their architecture.

    Raises:
        UsageError: if they belong to another one; says which names and shapes differ.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state_dict]
    surplus = [k for k in state_dict if k not in wanted]
    shapes = [
        f"{k} {tuple(state_dict[k].shape)} in place of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state_dict and state_dict[k].shape != wanted[k].shape
    ]
    if missing or surplus or shapes:
        parts = [
            f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            for what, found in (("missing", missing), ("unknown", surplus), ("of another shape", shapes))
            if found
        ]
        raise UsageError(f"the weights in {where} belong to another architecture: {'; '.join(parts)}.")
    model.load_state_dict(state_dict)
