"""A CLIP model as influence sees it: each pair's loss against fixed banks, and how far it is from saying a caption.

The contrastive loss of training is no sum over samples: a pair is the positive once, and a negative for all others of
its batch. Here every pair has a loss of its own, against *banks* of captions and images that do not move,

    L = 1/2 CE(image : own caption, bank of captions) + 1/2 CE(caption : own image, bank of images)

with captions of the bank that are the pair's own left out. What the model says of a picture is told by *concepts*, one
caption each; with several wordings of one concept the margin would measure the wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

from tarsift.sifters.influence import Batch, negative_margin

SAME = 0.999  # cosine from which captions are one
FAR = -1e4  # logit of what is left out


class Towers(nn.Module):
    """Both towers of an open_clip model as one network: pictures and tokens to embeddings at unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.model.encode_image(pictures), self.model.encode_text(tokens)  # pyright: ignore
        return functional.normalize(image, dim=1), functional.normalize(text, dim=1)


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


def _entropy(logits: Float[torch.Tensor, "b k"], draw: bool) -> Float[torch.Tensor, " b"]:
    """Return the loss of saying the first of all, or one that is drawn."""
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(dim=1), 1)[:, 0] if draw else torch.zeros_like(logits[:, 0]).long()
    return functional.cross_entropy(logits, drawn, reduction="none")
