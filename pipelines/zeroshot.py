"""What an encoder has learned, and what a trigger does to it: zero-shot accuracy and attack success."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from tarsift.operators.decoding import ImageConfig, fit_to_square
from tarsift.operators.errors import UsageError
from tarsift.operators.towers import LoadedEncoder, encode_captions, encode_images

Pictures = UInt8[np.ndarray, "n h w 3"]
Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
MICRO_BATCH = 64


@dataclass(frozen=True)
class AttackSuccess:
    """Shares of test pictures, none of them of the target, that are taken for the target; 0 to 1.

    `untriggered` is that share for the same pictures without the trigger: success means little
    where it is as high.
    """

    triggered: float
    untriggered: float
    pictures: int


def zero_shot(
    encoder: LoadedEncoder,
    images: Pictures,
    labels: Int64[np.ndarray, " n"],
    class_prompts: Sequence[Sequence[str]],
    *,
    similarity: Similarity | None = None,
) -> float:
    """Return the share of pictures whose nearest class is their own, 0 to 1.

    Args:
        encoder: a loaded encoder.
        images: RGB pictures of any size; they are fitted as the encoder's own transform does it.
        labels: index of each picture's class in `class_prompts`.
        class_prompts: several captions per class.
        similarity: how near images are to a class; None = `to_mean_direction`.
    """
    nearest = classify(encoder, images, class_prompts, similarity=similarity or to_mean_direction)
    return float(np.mean(nearest == labels))


def attack_success(
    encoder: LoadedEncoder,
    images: Pictures,
    trigger: Callable[[Pictures], Pictures],
    *,
    class_prompts: Sequence[Sequence[str]],
    target_prompts: Sequence[str] | None = None,
    labels: Int64[np.ndarray, " n"] | None = None,
    target_class: int | None = None,
    similarity: Similarity | None = None,
) -> AttackSuccess:
    """Return how often pictures are taken for the attack's target, with the trigger and without.

    The target is one class among all: either a further one, with prompts of its own, or the class
    `target_class`, whose own pictures are then left out.

    Args:
        encoder: a loaded encoder.
        images: RGB test pictures.
        trigger: puts the trigger on pictures.
        class_prompts: several captions per class.
        target_prompts: captions of a target that is none of the classes.
        labels: class of each picture; needed with `target_class`.
        target_class: index of the target in `class_prompts`.
        similarity: how near images are to a class; None = `to_mean_direction`.

    Raises:
        UsageError: unless exactly one of `target_prompts` and `target_class` is given, the latter with labels.
    """
    if (target_prompts is None) == (target_class is None) or (target_class is not None and labels is None):
        raise UsageError("give either `target_prompts`, or `target_class` together with `labels`.")
    prompts = list(class_prompts)
    if target_prompts is not None:
        prompts, target = [*prompts, target_prompts], len(prompts)
    else:
        target = target_class
        images = images[labels != target_class]
    if not len(images):
        raise UsageError("there is no test picture that is not of the target: attack success is a share of none.")
    rule = similarity or to_mean_direction
    with_trigger, without = (classify(encoder, x, prompts, similarity=rule) for x in (trigger(images), images))
    return AttackSuccess(float(np.mean(with_trigger == target)), float(np.mean(without == target)), len(images))


def to_mean_direction(
    images: Float32[np.ndarray, "n d"], captions: Float32[np.ndarray, "p d"]
) -> Float32[np.ndarray, " n"]:
    """Return the cosine of each image and the mean direction of a class's captions; both are given at unit length.

    Source: prompt ensembling, Radford et al. 2021 (arXiv 2103.00020), section 3.1.4.
    """
    return images @ _unit(captions.mean(axis=0))


def to_nearest_caption(
    images: Float32[np.ndarray, "n d"], captions: Float32[np.ndarray, "p d"]
) -> Float32[np.ndarray, " n"]:
    """Return the cosine of each image and the nearest of a class's captions; both are given at unit length.

    Where captions name more than the class (colours, places), their mean suits no picture well, and
    a word that the encoder has never read may come nearer.
    """
    return (images @ captions.T).max(axis=1)


def classify(
    encoder: LoadedEncoder,
    images: Pictures,
    class_prompts: Sequence[Sequence[str]],
    *,
    similarity: Similarity = to_mean_direction,
) -> Int64[np.ndarray, " n"]:
    """Return the index of the class nearest to each picture."""
    fit = fit_to_square(
        encoder.image_size,
        interpolation=encoder.interpolation,
        resize_mode=encoder.resize_mode,
        max_pixels=ImageConfig().max_pixels,
    )
    fitted = np.stack([np.asarray(fit(Image.fromarray(image)).convert("RGB")) for image in images])
    pictures = _unit(encode_images(encoder, fitted, micro_batch=MICRO_BATCH))
    captions = [_unit(encode_captions(encoder, prompts, micro_batch=MICRO_BATCH)) for prompts in class_prompts]
    return np.stack([similarity(pictures, group) for group in captions], axis=1).argmax(axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
