"""A CLIP model as influence sees it: each pair's loss against fixed banks, and how far it is from saying a caption.

The contrastive loss of training is no sum over samples: a pair is the positive once, and a negative for all others of
its batch. Here every pair has a loss of its own, against *banks* of captions and images that do not move,

    L = 1/2 CE(image : own caption, bank of captions) + 1/2 CE(caption : own image, bank of images)

with captions of the bank that are the pair's own left out. What the model says of a picture is told by *concepts*, one
caption each; with several wordings of one concept the margin would measure the wording.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import nn
from torch.nn import functional

from tarsift.sifters.influence import Batch, negative_margin
from tarsift.sifters.inputs import Pixels

Rows = Int64[torch.Tensor, " b"]
SAME = 0.999  # cosine from which captions are one
FAR = -1e4  # logit of what is left out


class Towers(nn.Module):
    """Both towers of an open_clip model as one network: pictures and tokens to embeddings at unit length.

    projection: what the image tower's output still goes through.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.projection = model, projection or nn.Identity()

    def forward(self, pictures: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.model.encode_image(pictures), self.model.encode_text(tokens)  # pyright: ignore
        return functional.normalize(self.projection(image), dim=1), functional.normalize(text, dim=1)


def with_projection(model: nn.Module) -> Towers:
    """Return a copy whose last projection of the image tower is a layer, whatever it is in the model.

    For vision transformers it is a matrix that is no layer, for ResNets one that attention uses without calling it.
    In models of other kinds it stays where it is.
    """
    whole = copy.deepcopy(model)
    return Towers(whole, _taken_out(whole.visual))  # pyright: ignore[reportArgumentType]


def _taken_out(visual: nn.Module) -> nn.Module:
    """Take the last projection out of an image tower, in place, and return it."""
    matrix: Any = getattr(visual, "proj", None)
    if isinstance(matrix, nn.Parameter):  # VisionTransformer: features @ proj
        projection = nn.Linear(*matrix.shape, bias=False, device=matrix.device, dtype=matrix.dtype)
        projection.weight = nn.Parameter(matrix.detach().T.contiguous())
        visual.proj = None  # pyright: ignore[reportArgumentType]
        return projection
    pool, head = getattr(visual, "attnpool", None), getattr(visual, "head", None)
    if isinstance(last := getattr(pool, "c_proj", None), nn.Linear):  # ModifiedResNet
        same = nn.Linear(last.in_features, last.in_features, device=last.weight.device, dtype=last.weight.dtype)
        nn.init.eye_(same.weight)
        nn.init.zeros_(same.bias)
        pool.c_proj = same  # pyright: ignore[reportOptionalMemberAccess]
        return last
    if isinstance(last := getattr(head, "proj", None), nn.Linear):  # TimmModel
        head.proj = nn.Identity()  # pyright: ignore[reportOptionalMemberAccess]
        return last
    return nn.Identity()


@dataclass(frozen=True)
class ImageText:
    """A subject whose samples are pictures (b, 3, h, w) float and tokens (b, t); see `influence.Subject`.

    images, captions: the banks, at unit length. concepts: captions that a picture can be said to be of, at unit
    length. scale: of cosines, as trained. tracked: see `layers_that_run`.
    """

    net: nn.Module
    images: Float[torch.Tensor, "k d"]
    captions: Float[torch.Tensor, "k d"]
    concepts: Float[torch.Tensor, "c d"]
    scale: float
    tracked: Sequence[str] | None

    def losses(self, net: nn.Module, batch: Batch, *, draw: bool = False) -> Float[torch.Tensor, " b"]:
        image, text = net(*batch)
        own = (image * text).sum(dim=1, keepdim=True)
        others = (image @ self.captions.T).masked_fill(self._same(text, self.captions), FAR)
        sides = [torch.cat([own, far], dim=1) * self.scale for far in (others, text @ self.images.T)]
        return sum((_entropy(side, draw) for side in sides), torch.zeros_like(own[:, 0])) / 2

    def margins(self, net: nn.Module, batch: Batch) -> Float[torch.Tensor, " b"]:
        image, text = net(*batch)
        own = (image * text).sum(dim=1, keepdim=True)
        others = (image @ self.concepts.T).masked_fill(self._same(text, self.concepts), FAR)
        first = torch.zeros(len(own), dtype=torch.long, device=own.device)
        return negative_margin(torch.cat([own, others], dim=1) * self.scale, first)

    def _same(self, text: Float[torch.Tensor, "b d"], known: Float[torch.Tensor, "k d"]) -> torch.Tensor:
        return text.detach() @ known.T > SAME


@dataclass(frozen=True)
class Paired:
    """Samples for unlearning (see `unlearn.Samples`): pictures as bytes with tokens, for `Towers`.

    Each picture and each caption of a batch answers with its cosine to all captions and pictures there; those whose
    caption is the same do not count against each other.
    """

    pictures: UInt8[torch.Tensor, "n 3 h w"]
    tokens: Int64[torch.Tensor, "n t"]
    mean: Float32[torch.Tensor, "3 1 1"]
    std: Float32[torch.Tensor, "3 1 1"]
    scale: float

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def device(self) -> torch.device:
        return self.pictures.device

    def batch(self, rows: Rows, draw: torch.Generator | None) -> Batch:
        inputs = Pixels(self.pictures, self.mean, self.std)
        return inputs.plain(rows) if draw is None else inputs.augmented(rows, draw), self.tokens[rows]

    def unchanged(self, batch: Batch) -> Float32[torch.Tensor, "1 3 h w"]:
        return torch.zeros_like(batch[0][:1])

    def logits(
        self, net: nn.Module, batch: Batch, change: Float32[torch.Tensor, "1 3 h w"] | None = None
    ) -> Float32[torch.Tensor, "a b"]:
        pictures, tokens = batch
        image, text = net(pictures if change is None else pictures + change, tokens)
        same = (tokens[:, None] == tokens[None]).all(dim=2)
        same.fill_diagonal_(False)
        cosines = (image @ text.T * self.scale).masked_fill(same, FAR)
        return torch.cat([cosines, cosines.T])

    def targets(self, rows: Rows) -> Int64[torch.Tensor, " a"]:
        return torch.arange(len(rows), device=rows.device).repeat(2)

    def owners(self, rows: Rows) -> Int64[torch.Tensor, " a"]:
        return rows.repeat(2)


def layers_that_run(net: nn.Module, batch: Batch) -> list[str]:
    """Return the linear and convolutional layers that a batch goes through as layers.

    Attention in torch and open_clip uses the weights of some of its layers without calling them: these cannot be
    followed.
    """
    ran: list[str] = []
    layers = {name: module for name, module in net.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name) if name not in ran else None)
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            net(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if name in ran]


def choose_concepts(
    said: Float32[np.ndarray, " d"], captions: Float32[np.ndarray, "n d"], *, most: int, apart: float
) -> Int64[np.ndarray, " c"]:
    """Return rows of captions, at unit length, that say other things than `said` and than each other.

    One after another, each at a cosine below `apart` to all before. Cosines are taken after the captions' mean is
    subtracted, which those of a trained text tower have in common.
    """
    mean = captions.mean(axis=0)
    centered = [_unit(rows - mean) for rows in (said[None], captions)]
    nearest = np.where(captions @ said > SAME, 1, centered[1] @ centered[0][0])
    chosen: list[int] = []
    while len(chosen) < most and (free := np.flatnonzero(nearest < apart)).size:
        chosen.append(int(free[0]))
        nearest = np.maximum(nearest, centered[1] @ centered[1][free[0]])
        nearest[free[0]] = 1
    return np.array(chosen, np.int64)


def _unit(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _entropy(logits: Float[torch.Tensor, "b k"], draw: bool) -> Float[torch.Tensor, " b"]:
    """Return the loss of saying the first of all, or one that is drawn."""
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(dim=1), 1)[:, 0] if draw else torch.zeros_like(logits[:, 0]).long()
    return functional.cross_entropy(logits, drawn, reduction="none")
