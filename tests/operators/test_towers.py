"""The towers as functions: exactly open_clip's input, at one shape."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from tarsift.operators.images import DecodeImages
from tarsift.operators.models import load_encoder
from tarsift.operators.schema import matrix
from tarsift.operators.towers import cosines, encode_captions, encode_images, norms
from tests.operators.test_images import IMAGES, rows


class Mirror(torch.nn.Module):
    """Give back what it is shown, and note the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def encode_image(self, images, normalize):
        self.shapes.append(tuple(images.shape))
        return images.flatten(1)


def transformed(encoder, images: list[bytes]) -> torch.Tensor:
    transform = image_transform(encoder.image_size, is_train=False, mean=encoder.mean, std=encoder.std)
    return torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_the_tower_is_shown_what_open_clip_would_show_it_to_the_bit():
    encoder = load_encoder("tiny", allow_random=True)
    images = list(IMAGES.values())
    mirror = Mirror()
    shown = dataclasses.replace(encoder, model=mirror)
    pixels = matrix(DecodeImages(32)(rows(*images))["pixels"])[0].reshape(-1, 32, 32, 3)
    out = encode_images(shown, pixels, micro_batch=8)
    np.testing.assert_array_equal(out, transformed(encoder, images).flatten(1).numpy())
    assert set(mirror.shapes) == {(8, 3, 32, 32)}


def test_a_large_model_gives_what_it_gives_in_open_clip():
    encoder = load_encoder("RN50", allow_random=True)
    images = [IMAGES["jpeg 4:2:0"], IMAGES["jpeg gray"], IMAGES["png RGBA"]]
    pixels = matrix(DecodeImages(224)(rows(*images))["pixels"])[0].reshape(-1, 224, 224, 3)
    captions = ["a cat", "two dogs"]
    with torch.inference_mode():
        expected = encoder.model.encode_image(transformed(encoder, images)).numpy()
        expected_text = encoder.model.encode_text(encoder.tokenizer(captions)).numpy()
    encoder.model.to(memory_format=torch.channels_last)
    np.testing.assert_allclose(encode_images(encoder, pixels, micro_batch=2), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(encode_captions(encoder, captions, micro_batch=3), expected_text, rtol=1e-3, atol=1e-5)


def test_nothing_in_nothing_out():
    encoder = load_encoder("tiny", allow_random=True)
    assert encode_images(encoder, np.empty((0, 32, 32, 3), np.uint8), micro_batch=4).shape == (0, 64)
    assert encode_captions(encoder, [], micro_batch=4).shape == (0, 64)


def test_norms_and_cosines_by_hand():
    a = np.array([[3, 4], [1, 0], [0, 0], [200, 200]], np.float16)
    b = np.array([[4, 3], [-2, 0], [1, 1], [300, 300]], np.float16)
    np.testing.assert_allclose(norms(a), [5, 1, 0, 200 * 2**0.5], rtol=1e-6)
    np.testing.assert_allclose(cosines(a, b), [24 / 25, -1, 0, 1], rtol=1e-6)
    assert np.abs(cosines(a, a)).max() <= 1
