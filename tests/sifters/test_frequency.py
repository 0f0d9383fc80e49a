"""Frequencies: a detector that has seen what triggers do finds a patch, and draws by its seed alone."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from tarsift.sifters.frequency import FrequencyDetector, changed_as_by_triggers, spectra
from tests.sifters.sets import pictures


def smooth(n: int, seed: int) -> np.ndarray:
    """Pictures of low frequencies, 16 pixels of a side."""
    small = torch.from_numpy(np.random.default_rng(seed).uniform(40, 215, (n, 3, 4, 4)).astype(np.float32))
    large = torch.nn.functional.interpolate(small, size=16, mode="bicubic", align_corners=False)
    return large.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def test_the_spectrum_keeps_the_energy():
    images, _ = pictures(4, side=16)
    assert spectra(images).shape == (4, 3, 16, 16)
    energy = ((images / 255.0) ** 2).sum(axis=(1, 2, 3))
    assert np.allclose((spectra(images) ** 2).sum(dim=(1, 2, 3)).numpy(), energy, rtol=1e-4)


def test_every_copy_differs_and_nothing_else_changes():
    images = smooth(40, seed=0)
    before = images.copy()
    found = changed_as_by_triggers(images, np.random.default_rng(0))
    assert (images == before).all()
    assert found.dtype == np.uint8
    assert all((a != b).any() for a, b in zip(found, images, strict=True))


def test_a_patch_that_it_has_never_seen_is_found_and_a_seed_gives_the_same_scores():
    random = torch.get_rng_state()
    detector = FrequencyDetector(smooth(200, seed=1), seed=2, epochs=4)
    assert torch.equal(torch.get_rng_state(), random)
    clean = smooth(100, seed=3)
    planted = clean.copy()
    planted[:, -3:, -3:] = np.array([[[0], [255], [0]], [[255], [0], [255]], [[0], [255], [0]]])
    scores = detector.score(np.concatenate([clean, planted]))
    assert roc_auc_score(np.arange(200) >= 100, scores) > 0.8
    again = FrequencyDetector(smooth(200, seed=1), seed=2, epochs=4)
    assert again.score(clean).tobytes() == scores[:100].tobytes()
    assert len(detector.score(clean[:0])) == 0
