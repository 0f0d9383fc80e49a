"""One score from two sides: how odd an image is, and how badly its caption fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from tarsift.clip_detect.density import check_rule
from tarsift.clip_detect.threshold import median_mad, robust_z

CAPTION_WEIGHT = 0.5  # natural captions that fit badly are more frequent than images that lie apart


@dataclass(frozen=True)
class Verdict:
    """Median and MAD of each side, and of what they are combined to, over the candidate sample."""

    density_scale: Float64[np.ndarray, " 2"]
    captions_scale: Float64[np.ndarray, " 2"]
    scale: Float64[np.ndarray, " 2"]

    def score(
        self, density: Float[np.ndarray, " n"] | None, captions: Float[np.ndarray, " n"] | None
    ) -> Float32[np.ndarray, " n"]:
        """Combine the two sides; None: that side is not judged. NaN (no caption): the other decides alone."""
        if density is None or captions is None:
            only = captions if density is None else density
            assert only is not None  # one of the two is there
            return only.astype(np.float32)
        image = robust_z(density, *self.density_scale)
        caption = np.nan_to_num(robust_z(captions, *self.captions_scale))
        return (image + CAPTION_WEIGHT * caption).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the rule as plain arrays (for `np.savez`) and a dict that json can write."""
        return {name: getattr(self, name) for name in _SCALES}, {"rule": "verdict-1"}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Verdict:
        """Rebuild a rule from `state`, bit for bit."""
        check_rule(settings, "verdict-1")
        return cls(**{name: np.asarray(arrays[name]) for name in _SCALES})


_SCALES = ("density_scale", "captions_scale", "scale")


def fit_verdict(density: Float[np.ndarray, " n"] | None, captions: Float[np.ndarray, " n"] | None) -> Verdict:
    """Fit on the scores of a random sample; None: that side is not judged."""
    scales = [_scale(side) for side in (density, captions)]
    unscaled = Verdict(scales[0], scales[1], np.array([0.0, 1.0]))
    return Verdict(scales[0], scales[1], _scale(unscaled.score(density, captions)))


def _scale(side: np.ndarray | None) -> Float64[np.ndarray, " 2"]:
    return np.array([0.0, 1.0]) if side is None else median_mad(side[~np.isnan(side)])
