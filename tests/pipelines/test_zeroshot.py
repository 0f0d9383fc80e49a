"""Zero-shot accuracy and attack success against an encoder whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from tarsift.operators.errors import UsageError
from tarsift.operators.models import LoadedEncoder
from tarsift.pipelines.zeroshot import attack_success, classify, to_mean_direction, to_nearest_caption, zero_shot

WORDS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class Colours(nn.Module):
    """A CLIP that sees the mean colour of a picture and reads the colour's name."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([*WORDS.values(), (0.5, 0.5, 0.5)]))

    def encode_image(self, images, normalize=False):
        return images.mean((2, 3)) + 1e-4

    def encode_text(self, tokens, normalize=False):
        return self.table[tokens[:, 0]]


def tokenize(captions):
    known = list(WORDS)
    return torch.tensor([[next((known.index(w) for w in c.split() if w in WORDS), 3)] for c in captions])


@pytest.fixture
def encoder():
    return LoadedEncoder(
        model=Colours(), tokenizer=tokenize, image_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
        interpolation="bicubic", resize_mode="shortest", context_length=1, embed_dim=3, name="colours",
        weights_sha256="", trained_on=None, steps=None, config=None,
    )  # fmt: skip


def pictures(*colours):
    rows = [np.array(WORDS[c]) * 255 for c in colours]
    return np.stack([np.broadcast_to(row, (6, 9, 3)) for row in rows]).astype(np.uint8)


PROMPTS = [["a red thing", "red"], ["green"]]


def test_similarities_by_hand():
    captions = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    images = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(to_mean_direction(images, captions), [0.5**0.5, 1.4 * 0.5**0.5, 0], atol=1e-6)
    np.testing.assert_allclose(to_nearest_caption(images, captions), [1, 0.8, 0], atol=1e-6)


def test_the_rule_decides_between_a_broad_class_and_a_narrow_one(encoder):
    images = pictures("red")
    broad, narrow = ["red", "green", "blue"], ["red", "green"]  # the broad mean is farther from red
    assert classify(encoder, images, [broad, narrow], similarity=to_mean_direction).tolist() == [1]
    assert classify(encoder, images, [broad, narrow], similarity=to_nearest_caption).tolist() == [0]  # a tie: the first


def test_zero_shot_is_the_share_of_right_answers(encoder):
    images = pictures("red", "green", "green", "red")
    assert zero_shot(encoder, images, np.array([0, 1, 1, 0]), PROMPTS) == 1.0
    assert zero_shot(encoder, images, np.array([0, 1, 0, 1]), PROMPTS) == 0.5
    assert classify(encoder, images, PROMPTS).tolist() == [0, 1, 1, 0]


def paint_blue(images):
    out = images.copy()
    out[1:] = (0, 0, 255)  # the first picture resists
    return out


def test_attack_success_with_a_target_of_its_own(encoder):
    images = pictures("red", "green", "blue", "red")
    found = attack_success(encoder, images, paint_blue, class_prompts=PROMPTS, target_prompts=["blue"])
    assert (found.triggered, found.untriggered, found.pictures) == (0.75, 0.25, 4)


def test_attack_success_leaves_out_the_targets_own_pictures(encoder):
    images, labels = pictures("red", "green", "blue", "blue", "red"), np.array([0, 1, 2, 2, 0])
    prompts = [*PROMPTS, ["blue"]]
    found = attack_success(encoder, images, paint_blue, class_prompts=prompts, labels=labels, target_class=2)
    assert (found.triggered, found.untriggered, found.pictures) == (2 / 3, 0.0, 3)


def test_what_makes_no_sense_is_refused(encoder):
    images = pictures("blue")
    with pytest.raises(UsageError, match="give either"):
        attack_success(encoder, images, paint_blue, class_prompts=PROMPTS)
    with pytest.raises(UsageError, match="give either"):
        attack_success(encoder, images, paint_blue, class_prompts=PROMPTS, target_class=0)
    with pytest.raises(UsageError, match="a share of none"):
        attack_success(
            encoder, images, paint_blue, class_prompts=[*PROMPTS, ["blue"]], labels=np.array([2]), target_class=2
        )
