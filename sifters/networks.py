"""Networks that sifters train: heads for frozen features, and convolutional networks for pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float32
from torch import nn
from torchvision import models

HIDDEN = 128


class Head(nn.Sequential):
    """Two layers on standardised features."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(
            nn.Linear(features, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)
        )


class SmallCnn(nn.Sequential):
    """Six convolutions for pictures of about 32 pixels: what a CPU can train."""

    def __init__(self, channels: int, classes: int, *, width: int = 32) -> None:
        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        super().__init__(
            *block(channels, width), *block(width, width), nn.MaxPool2d(2),
            *block(width, 2 * width), *block(2 * width, 2 * width), nn.MaxPool2d(2),
            *block(2 * width, 4 * width), *block(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
        )  # fmt: skip


class PreActBlock(nn.Module):
    """A residual block that normalises before it convolves (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = None if stride == 1 and before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Float32[torch.Tensor, "b c h w"]) -> Float32[torch.Tensor, "b e i j"]:
        out = torch.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(torch.relu(self.norm2(self.conv1(out))))


def preact_resnet18(channels: int, classes: int) -> nn.Module:
    """PreActResNet-18 for pictures of about 32 pixels, as ISPL uses it for CIFAR-10."""
    blocks: list[nn.Module] = []
    before = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [PreActBlock(before, after, stride), PreActBlock(after, after, 1)]
        before = after
    stem = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    tail = (nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    return nn.Sequential(stem, *blocks, *tail)


class BasicBlock(nn.Module):
    """A residual block with a shortcut that subsamples and pads with zeros (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: Float32[torch.Tensor, "b c h w"]) -> Float32[torch.Tensor, "b e i j"]:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        kept = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(out + kept)


def resnet32(channels: int, classes: int) -> nn.Module:
    """ResNet-32 for pictures of about 32 pixels, as ISPL uses it for GTSRB."""
    blocks: list[nn.Module] = []
    before = 16
    for after in (16, 32, 64):
        for i in range(5):
            blocks.append(BasicBlock(before, after, 2 if i == 0 and after > 16 else 1))
            before = after
    stem = (nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def resnet(channels: int, classes: int, *, depth: int) -> nn.Module:
    """torchvision's ResNet with a first layer for pictures of about 32 pixels, as Meta-Sift uses it."""
    net = getattr(models, f"resnet{depth}")(num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


# Each takes the length of features or the channels of pictures, and the number of classes.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "head": Head,
    "tiny-cnn": partial(SmallCnn, width=16),
    "small-cnn": SmallCnn,
    "preact-resnet18": preact_resnet18,
    "resnet32": resnet32,
    "resnet18": partial(resnet, depth=18),
    "resnet34": partial(resnet, depth=34),
    "resnet50": partial(resnet, depth=50),
}
FOR_FEATURES = ("head",)


def build_network(name: str | None, shape: tuple[int, ...], classes: int, *, seed: int) -> nn.Module:
    """Return a network for samples of a shape, its weights drawn from the seed; torch's own random state is kept.

    name: in `NETWORKS`; None: `head` for features, `small-cnn` for pictures.

    Raises:
        ValueError: no such network, or one for the other kind of input.
    """
    features = len(shape) == 1
    name = name or ("head" if features else "small-cnn")
    fitting = [known for known in NETWORKS if (known in FOR_FEATURES) == features]
    if name not in fitting:
        kind = "features" if features else "pictures"
        raise ValueError(f"there is no network {name!r} for {kind}: choose one of {', '.join(fitting)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](shape[0], classes)
