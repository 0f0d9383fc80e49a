"""Changes of single pictures, made against a model: by them poison is hidden under labels that are right."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import nn
from torch.func import functional_call
from torch.nn import functional

ASCENT_STEPS, ASCENT_STRIDE = 20, 0.15  # of projected gradient ascent; the stride as a part of the bound
COLLISION_STEPS, COLLISION_RATE, COLLISION_CLOSENESS = 100, 0.01, 1.0
MATCHING_STEPS, MATCHING_STRIDE, MATCHING_FALLS = 250, 0.1, (93, 156, 218)  # a tenth of the stride from each of these
PICTURES = 256  # attacked at a time through a model

# Pictures 0 to 1 (b, 3, h, w) to what the attack is made against: logits, or features of any shape.
Model = Callable[[torch.Tensor], torch.Tensor]


def raise_loss(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int64[np.ndarray, " n"],
    *,
    model: Model,
    victim: UInt8[np.ndarray, "h w 3"] | None = None,
    strength: float,
    draw: np.random.Generator,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Change pictures so that the model's loss rises, by projected gradient ascent from a random start.

    No pixel changes by more than `strength` of the range, after rounding to bytes too. model: pictures to logits, in
    the state in which it judges. victim: not used.
    """
    bound = _bound(strength)
    out = []
    for part in _parts(len(images)):
        targets = torch.from_numpy(labels[part])
        changed, low, high = _random_start(images[part], bound, draw)
        for _ in range(ASCENT_STEPS):
            changed.requires_grad_()
            loss = functional.cross_entropy(model(changed), targets, reduction="sum")
            (slope,) = torch.autograd.grad(loss, changed)
            changed = torch.clamp(changed.detach() + ASCENT_STRIDE * bound * slope.sign(), low, high)
        out.append(_array(changed))
    return np.concatenate(out)


def collide(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int64[np.ndarray, " n"] | None = None,
    *,
    model: Model,
    victim: UInt8[np.ndarray, "h w 3"],
    strength: float,
    draw: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Change pictures so that the model sees the victim in them, while they stay close to what they were.

    The victim is mixed in first; `strength` is its share. Then Adam, in place of the paper's splitting, lowers the
    squared distance of features, in units of where it began, plus the mean squared change of pixels. model: pictures
    to features, in the state in which it judges. labels, draw: not used.
    """
    with torch.no_grad():
        goal = model(_tensor(victim[None])).flatten(1)
    out = []
    for part in _parts(len(images)):
        start = (1 - strength) * _tensor(images[part]) + strength * _tensor(victim[None])
        changed = start.clone().requires_grad_()
        adam = torch.optim.Adam([changed], lr=COLLISION_RATE)
        with torch.no_grad():
            unit = (model(start).flatten(1) - goal).square().sum(dim=1).clamp_min(1e-12)
        for _ in range(COLLISION_STEPS):
            apart = (model(changed).flatten(1) - goal).square().sum(dim=1)
            moved = (changed - start).square().mean(dim=(1, 2, 3))
            (changed.grad,) = torch.autograd.grad((apart / unit + COLLISION_CLOSENESS * moved).sum(), changed)
            adam.step()
            with torch.no_grad():
                changed.clamp_(0, 1)
        out.append(_array(changed.detach()))
    return np.concatenate(out)


def match_gradient(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int64[np.ndarray, " n"],
    *,
    model: Model,
    victim: UInt8[np.ndarray, "h w 3"],
    strength: float,
    draw: np.random.Generator,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Change pictures so that training on them is like training on the victim under their label.

    The cosine of the slope of a model's loss on them and of that on the victim is raised by Adam on its signs, from a
    random start; no pixel changes by more than `strength` of the range, after rounding to bytes too. Without the
    restarts and the augmentation of the paper, so that a CPU can do it. model: pictures to logits, a network in the
    state in which it judges. labels: all the same, which the victim is to be taken for.
    """
    if not isinstance(model, nn.Module):
        raise ValueError("`model` must be a network: slopes in its weights are matched.")
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}

    def slope(pictures: torch.Tensor, targets: torch.Tensor, *, kept: bool) -> Float[torch.Tensor, " w"]:
        loss = functional.cross_entropy(functional_call(model, weights, (pictures,)), targets)
        parts = torch.autograd.grad(loss, list(weights.values()), create_graph=kept)
        return torch.cat([part.flatten() for part in parts])

    bound = _bound(strength)
    goal = slope(_tensor(victim[None]), torch.from_numpy(labels[:1]), kept=False)
    out = []
    for part in _parts(len(images)):
        targets = torch.from_numpy(labels[part])
        changed, low, high = _random_start(images[part], bound, draw)
        adam = torch.optim.Adam([changed.requires_grad_()], lr=MATCHING_STRIDE * bound)
        fall = torch.optim.lr_scheduler.MultiStepLR(adam, MATCHING_FALLS, gamma=0.1)
        for _ in range(MATCHING_STEPS):
            apart = 1 - functional.cosine_similarity(slope(changed, targets, kept=True), goal, dim=0)
            changed.grad = torch.autograd.grad(apart, changed)[0].sign()
            adam.step()
            fall.step()
            with torch.no_grad():
                changed.copy_(torch.clamp(changed, low, high))
        out.append(_array(changed.detach()))
    return np.concatenate(out)


def _bound(strength: float) -> float:
    """Return the largest change, 0 to 1, that is still one of bytes after rounding."""
    bound = math.floor(255 * strength + 1e-6) / 255
    if not bound:
        raise ValueError(f"`strength` of 1/255 is the least change of a picture of bytes: got {strength:g}.")
    return bound


def _random_start(
    images: UInt8[np.ndarray, "n h w 3"], bound: float, draw: np.random.Generator
) -> tuple[Float32[torch.Tensor, "n 3 h w"], Float32[torch.Tensor, "n 3 h w"], Float32[torch.Tensor, "n 3 h w"]]:
    """Return pictures changed at random within a bound, and the least and the most that each pixel may be."""
    start = _tensor(images)
    low, high = (start - bound).clamp_min(0), (start + bound).clamp_max(1)
    noise = torch.from_numpy(draw.uniform(-bound, bound, start.shape).astype(np.float32))
    return torch.clamp(start + noise, low, high), low, high


def _parts(count: int) -> list[slice]:
    return [slice(start, start + PICTURES) for start in range(0, count, PICTURES)]


def _tensor(images: UInt8[np.ndarray, "n h w 3"]) -> Float32[torch.Tensor, "n 3 h w"]:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def _array(pictures: Float32[torch.Tensor, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    return (255 * pictures).round().clamp(0, 255).byte().numpy().transpose(0, 2, 3, 1)
