"""Encoder files: weights with the record of what they were trained on, read without running anything.

`torch.load` is only ever called with `weights_only=True`: a file may hold tensors and plain types.
"""

from __future__ import annotations

import hashlib
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
class Base:
    """The encoder that a training went on from, and what that one had been trained on before.

    `shards` (name to SHA-256) and `steps` are those of all trainings before; `steps` is None where one of them is not
    known. `unknown` names the first encoder of the line whose file does not say what it was trained on, None if all do.
    """

    name: str
    weights_sha256: str
    shards: dict[str, str]
    steps: int | None
    unknown: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What an encoder file holds: the model and the record of what it was trained on.

    `shards`, `steps`, `samples` and `seed` are those of its own training; `base` tells of the ones before, None where
    it was trained from scratch.
    """

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    shards: dict[str, str]
    steps: int
    samples: int
    seed: int
    extra: dict[str, Any]
    base: Base | None = None

    @property
    def trained_on(self) -> dict[str, str]:
        """SHA-256 by name of every shard that the weights have seen, those of the base included.

        A shard of the base whose name belongs to another one here has `BASE:` before it.
        """
        seen, base = dict(self.shards), self.base
        for name, digest in base.shards.items() if base else ():
            while seen.get(name, digest) != digest:
                name = f"{base.name}:{name}"  # pyright: ignore[reportOptionalMemberAccess]
            seen[name] = digest
        return seen

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of this and all trainings before, None where one of them is not known."""
        before = self.base.steps if self.base else 0
        return None if before is None else before + self.steps

    @property
    def unknown_base(self) -> str | None:
        """Name of the first encoder before this one whose file does not say what it was trained on."""
        return self.base.unknown if self.base else None


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
        own = {name: content[name] for name in Checkpoint.__dataclass_fields__ if name != "base"}
        base = content.get("base") and Base(**{name: content["base"][name] for name in Base.__dataclass_fields__})
        return Checkpoint(**own, base=base)
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
    return tensors_in(data, url)


def tensors_in(data: bytes, url: str) -> Any:
    """Read tensors and plain types, and nothing else, from the bytes of a file; `url` is for the error's sentence.

    Raises:
        TarsiftError: if they are damaged, or hold anything else.
    """
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


def state_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of a state dict, as `weights_sha256` does for a model."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        value = value.detach().to("cpu").contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
