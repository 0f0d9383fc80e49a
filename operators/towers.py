"""A CLIP model that is loaded, and its two towers as functions from arrays to arrays.

Both always run at one fixed, padded micro-batch shape. The arithmetic of a convolution or a matrix
product depends on its shape, so a sample's embedding would otherwise depend on how many others
happened to come with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8

from tarsift.operators.encoder_settings import EncoderInfo
from tarsift.operators.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder(EncoderInfo):
    """A CLIP model ready to encode.

    `tokenizer` maps a list of captions to a LongTensor (n, context_length). `config` is the JSON config that the
    model can be built from, None for published models that come with one of their own.
    """

    model: torch.nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    config: dict[str, Any] | None


def encode_images(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "n h w 3"], *, micro_batch: int, precision: Precision = "fp32"
) -> Float32[np.ndarray, "n d"]:
    """Embed images that are resized already; the result is not normalised."""
    device = _device(encoder)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (encoder.mean, encoder.std))

    def run(part: torch.Tensor) -> torch.Tensor:
        # The arithmetic of ToTensor and Normalize, to the bit; a permuted (n, h, w, c) is channels_last as it is.
        scaled = part.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        return encoder.model.encode_image(scaled, normalize=False)  # pyright: ignore[reportCallIssue]

    return _in_micro_batches(run, pixels, encoder.embed_dim, micro_batch, device, precision)


def encode_captions(
    encoder: LoadedEncoder, captions: Sequence[str] | np.ndarray, *, micro_batch: int, precision: Precision = "fp32"
) -> Float32[np.ndarray, "n d"]:
    """Embed captions; the result is not normalised."""
    if not len(captions):
        return np.empty((0, encoder.embed_dim), np.float32)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        return encoder.model.encode_text(tokens, normalize=False)  # pyright: ignore[reportCallIssue]

    tokens = encoder.tokenizer(list(captions)).numpy()
    return _in_micro_batches(run, tokens, encoder.embed_dim, micro_batch, _device(encoder), precision)


def norms(embeddings: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, " n"]:
    """Return the Euclidean norm of each row."""
    wide = embeddings.astype(np.float32)
    return np.sqrt((wide * wide).sum(axis=1))


def cosines(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, " n"]:
    """Return the cosine of each row of `a` with that of `b`, -1 to 1; 0 where either is zero."""
    length = norms(a) * norms(b)
    dot = (a.astype(np.float32) * b.astype(np.float32)).sum(axis=1)
    return np.clip(np.divide(dot, length, out=np.zeros_like(dot), where=length > 0), -1, 1)


def choose_device(device: str) -> torch.device:
    """Return the torch device of a setting.

    Raises:
        UsageError: if it is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"`device` must be auto, cpu, cuda or cuda:N, got {device!r}.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`device` is {device!r}, but torch sees no GPU here. Use device=auto or cpu.")
    return chosen


def _device(encoder: LoadedEncoder) -> torch.device:
    return next(encoder.model.parameters()).device


def _in_micro_batches(
    run: Callable[[torch.Tensor], torch.Tensor],
    rows: np.ndarray,
    embed_dim: int,
    micro_batch: int,
    device: torch.device,
    precision: Precision,
) -> Float32[np.ndarray, "n d"]:
    """Run rows through a tower in parts of one shape, the last padded with zeros."""
    if not len(rows):
        return np.empty((0, embed_dim), np.float32)
    outputs = []
    # Weights stay fp32 and autocast lowers matrix products alone: norms and softmax keep their precision.
    with torch.inference_mode(), torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        for start in range(0, len(rows), micro_batch):
            part = rows[start : start + micro_batch]
            # A fresh copy: batches from Ray are read-only views, and pinned memory travels beside the computation.
            staged = torch.zeros(
                (micro_batch, *rows.shape[1:]),
                dtype=torch.from_numpy(np.empty(0, rows.dtype)).dtype,
                pin_memory=device.type == "cuda",
            )
            staged.numpy()[: len(part)] = part
            outputs.append(run(staged.to(device, non_blocking=True))[: len(part)])
        return torch.cat(outputs).float().cpu().numpy()
