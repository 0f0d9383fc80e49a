"""Changes of a query: each changes it, all are drawn by the seed alone, and pictures of any size will do."""

import numpy as np
import pytest
import torch

from tarsift.sifters.transforms import changed, changes_for

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", list(changes_for(8, 8)))
@pytest.mark.parametrize("side", [8, 32])
def test_every_change_changes_pixels_and_nothing_else(name, side):
    picture = torch.from_numpy(PICTURE[:side, :side].transpose(2, 0, 1).copy())
    found = changes_for(side, side)[name](picture)
    assert found.shape == picture.shape
    assert found.dtype == torch.uint8
    assert (found != picture).any()


def test_copies_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    once = changed(PICTURE, 12, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = changed(PICTURE, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert once.tobytes() == again.tobytes()
    assert once.shape == (12, 32, 40, 3)
    assert once.tobytes() != changed(PICTURE, 12, seed=4).tobytes()


def test_fewer_copies_are_the_first_of_more():
    assert (changed(PICTURE, 5, seed=3) == changed(PICTURE, 9, seed=3)[:5]).all()
