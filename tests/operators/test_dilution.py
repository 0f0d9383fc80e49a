"""Diluted views: drawn for each picture by its content, whatever lies beside it."""

import numpy as np

from tarsift.operators.dilution import dilute

FILL = (0.5, 0.4, 0.3)


def test_a_view_depends_on_the_picture_and_its_number_alone():
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    views = [dilute(pictures, view, fill=FILL) for view in (0, 1)]
    assert views[0].shape == pictures.shape
    assert views[0].dtype == np.uint8
    assert (views[0] != views[1]).any(axis=(1, 2, 3)).all()
    assert (dilute(pictures[[4, 1]], 0, fill=FILL) == views[0][[4, 1]]).all()
    copies = dilute(np.repeat(pictures[:1], 3, axis=0), 1, fill=FILL)
    assert (copies == views[1][0]).all()


def test_what_comes_in_from_outside_is_the_fill():
    even = np.full((40, 16, 16, 3), np.round(np.array(FILL) * 255), np.uint8)
    even[:, :, :, 0] += np.arange(40, dtype=np.uint8)[:, None, None]  # so that each is drawn for anew
    out = dilute(even, 0, fill=FILL).astype(int)
    assert np.abs(out[..., 1:] - even[..., 1:].astype(int)).max() <= 1
    assert (out[..., 0].min(axis=(1, 2)) >= 127).all()


def test_no_pictures_are_no_views():
    assert len(dilute(np.zeros((0, 16, 16, 3), np.uint8), 0, fill=FILL)) == 0
