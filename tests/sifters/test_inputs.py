import numpy as np
import pytest
import torch

from tarsift.sifters.inputs import Perturbation, as_inputs, blur, perturb, warp
from tests.sifters.sets import pictures


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pictures_are_standardised_by_channel():
    images, _ = pictures()
    inputs = as_inputs(images)
    batch = inputs.plain(torch.arange(len(inputs)))
    assert inputs.shape == batch.shape[1:] == (3, 16, 16)
    assert batch.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(batch.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3)


def test_features_are_standardised_by_the_plain_view():
    views = np.random.default_rng(0).normal(3, 2, size=(2, 500, 4))
    views[..., 3] = 7  # a feature that tells nothing
    inputs = as_inputs(views)
    plain = inputs.plain(torch.arange(500))
    assert torch.allclose(plain[:, :3].std(dim=0), torch.ones(3), atol=1e-2)
    assert (plain[:, 3] == 0).all()
    assert inputs.shape == (4,)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((4, 8, 8), np.uint8), "must be pictures"),
        (np.zeros((4, 8), np.int64), "must be pictures"),
        (np.full((4, 8), np.nan), "not finite"),
    ],
)
def test_what_it_refuses(images, says):
    with pytest.raises(ValueError, match=says):
        as_inputs(images)


def test_features_are_diluted_by_another_view():
    views = np.repeat(np.arange(3.0)[:, None, None], 200, axis=1) + np.random.default_rng(0).normal(size=(1, 200, 1))
    inputs = as_inputs(views)
    rows = torch.arange(200)
    shift = inputs.diluted(rows, drawn()) - inputs.plain(rows)
    assert (shift > 0.5).all()  # never the plain view
    assert shift.round(decimals=3).unique().numel() == 2
    assert (as_inputs(views[0]).diluted(rows, drawn()) == as_inputs(views[0]).plain(rows)).all()


def test_without_rotation_a_warp_is_a_mirror_and_a_shift_by_whole_pixels():
    height, width = 16, 24
    batch = torch.rand(64, 3, height, width)
    found = set()
    how = Perturbation.of(torch.rand(5, 64, generator=drawn()), height, width).upright()
    for before, after in zip(batch, warp(batch, how), strict=True):
        for mirrored in (False, True):
            source = torch.nn.functional.pad(before.flip(2) if mirrored else before, (3, 3, 2, 2))
            for dy in range(5):
                for dx in range(7):
                    if torch.equal(after, source[:, dy : dy + height, dx : dx + width]):
                        found.add((mirrored, dy, dx))
                        break
                else:
                    continue
                break
            else:
                continue
            break
        else:
            pytest.fail("a picture is neither of these")
    assert len(found) > 20


def test_dilution_is_drawn_for_each_picture_and_by_the_generator():
    images, _ = pictures(8)
    inputs = as_inputs(np.repeat(images[:1], 8, axis=0))
    rows = torch.arange(8)
    once, again, other = (inputs.diluted(rows, drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)
    assert len({picture.numpy().tobytes() for picture in once}) == 8


def test_a_picture_is_diluted_the_same_in_any_company():
    batch, uniform = torch.rand(9, 3, 16, 16), torch.rand(5, 9, generator=drawn())
    together = perturb(batch, Perturbation.of(uniform, 16, 16))
    for rows in ([4], [7, 2], [8, 0, 1]):
        apart = perturb(batch[rows], Perturbation.of(uniform[:, rows], 16, 16))
        assert torch.equal(apart, together[rows])


def test_shifts_reach_an_eighth_of_the_side_and_no_more():
    how = Perturbation.of(torch.rand(5, 4000, generator=drawn()), 32, 16)
    assert sorted(how.down.unique().tolist()) == [*range(-4, 5)]
    assert sorted(how.right.unique().tolist()) == [*range(-2, 3)]
    edges = Perturbation.of(torch.tensor([[1.0]] * 5), 32, 16)
    assert (edges.down.item(), edges.right.item()) == (4, 2)


def test_blur_keeps_what_is_even_and_smooths_the_rest():
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    even = torch.full((4, 3, 8, 8), 2.5)
    assert torch.allclose(blur(even, sigma), even, atol=1e-5)
    noise = torch.randn(1, 3, 8, 8, generator=drawn()).expand(4, -1, -1, -1)
    spread = blur(noise, sigma).std(dim=(1, 2, 3))
    assert (spread.diff() < 0).all()
    assert torch.allclose(blur(noise, sigma)[0], noise[0], atol=1e-4)
    point = torch.zeros(1, 3, 5, 5)
    point[..., 2, 2] = 1.0
    assert torch.allclose(blur(point, torch.tensor([1.0])).sum(), torch.tensor(3.0))
