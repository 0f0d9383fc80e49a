"""One score from two sides: how odd an image is, and how badly its caption fits.

Where a witness has seen the images too, the first side has a second opinion: whether an image's neighbours are alike
to it. It judges only together with the density, from whose neighbours it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from tarsift.clip_detect.density import check_rule
from tarsift.clip_detect.threshold import median_mad, robust_z

DISAGREEMENT_WEIGHT = 0.5
CAPTION_WEIGHT = 0.5  # natural captions that fit badly are more frequent than images that lie apart


@dataclass(frozen=True)
class Verdict:
    """Median and MAD of each part, and of what they are combined to, over the candidate sample."""

    density_scale: Float64[np.ndarray, " 2"]
    disagreement_scale: Float64[np.ndarray, " 2"]
    captions_scale: Float64[np.ndarray, " 2"]
    scale: Float64[np.ndarray, " 2"]

    def score(
        self,
        density: Float[np.ndarray, " n"] | None,
        captions: Float[np.ndarray, " n"] | None,
        disagreement: Float[np.ndarray, " n"] | None = None,
    ) -> Float32[np.ndarray, " n"]:
        """Combine the sides; None: that side is not judged. NaN (no caption, not seen): the others decide alone."""
        parts = [
            (weight, side, scale)
            for weight, side, scale in (
                (1.0, density, self.density_scale),
                (DISAGREEMENT_WEIGHT, disagreement, self.disagreement_scale),
                (CAPTION_WEIGHT, captions, self.captions_scale),
            )
            if side is not None
        ]
        if len(parts) == 1:
            return parts[0][1].astype(np.float32)
        standardised = [weight * np.nan_to_num(robust_z(side, *scale)) for weight, side, scale in parts]
        return np.sum(standardised, axis=0).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the rule as plain arrays (for `np.savez`) and a dict that json can write."""
        return {name: getattr(self, name) for name in _SCALES}, {"rule": "verdict-2"}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Verdict:
        """Rebuild a rule from `state`, bit for bit."""
        check_rule(settings, "verdict-2")
        return cls(**{name: np.asarray(arrays[name]) for name in _SCALES})


_SCALES = ("density_scale", "disagreement_scale", "captions_scale", "scale")


def fit_verdict(
    density: Float[np.ndarray, " n"] | None,
    captions: Float[np.ndarray, " n"] | None,
    disagreement: Float[np.ndarray, " n"] | None = None,
) -> Verdict:
    """Fit on the scores of a random sample; None: that side is not judged.

    Raises:
        ValueError: nothing judges, or disagreement is to judge without density.
    """
    if density is None and (captions is None or disagreement is not None):
        raise ValueError("a verdict needs density or captions; disagreement judges beside density only.")
    scales = [_scale(side) for side in (density, disagreement, captions)]
    unscaled = Verdict(scales[0], scales[1], scales[2], np.array([0.0, 1.0]))
    return replace(unscaled, scale=_scale(unscaled.score(density, captions, disagreement)))


def _scale(side: np.ndarray | None) -> Float64[np.ndarray, " 2"]:
    return np.array([0.0, 1.0]) if side is None else median_mad(side[~np.isnan(side)])
