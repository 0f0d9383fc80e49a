"""Every sifter by name, under one signature: a labelled set to a `SiftResult`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int64

from tarsift.sifters.baselines import BASELINES, sift_by
from tarsift.sifters.ispl import ispl
from tarsift.sifters.meta_sift import meta_sift
from tarsift.sifters.result import SiftResult
from tarsift.sifters.settings import SifterConfig

Sifter = Callable[..., SiftResult]  # (images, labels, *, config, seed, device)


def _baseline(name: str) -> Sifter:
    def sifter(images: np.ndarray, labels: np.ndarray, **options: Any) -> SiftResult:
        return sift_by(name, images, labels, **options)

    return sifter


SIFTERS: dict[str, Sifter] = {
    "meta-sift": meta_sift,
    "ispl": ispl,
    **{name.replace("_", "-"): _baseline(name) for name in BASELINES},
}


RESUMABLE = ("meta-sift", "ispl")  # those that also take `state` and `save`


def sift(
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    config: SifterConfig | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    **resuming: Any,
) -> SiftResult:
    """Sift a labelled set by the sifter that the settings name; arguments as those of `meta_sift`.

    resuming: `state` and `save` of a sifter in `RESUMABLE`.

    Raises:
        ValueError: shapes do not fit each other or the network, or there are fewer than two classes.
    """
    config = config or SifterConfig()
    return SIFTERS[config.sifter](images, labels, config=config.settings, seed=seed, device=device, **resuming)
