"""What a notebook shows of samples and scores: pictures, neighbours, groups and charts, as pieces of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from markupsafe import Markup

from tarsift.operators.decoding import ImageConfig, UnusableImage, strict_pillow
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.pictures import picture_of
from tarsift.pipelines.report.charts import Histogram, histogram_svg
from tarsift.pipelines.report.data import ReportConfig
from tarsift.pipelines.report.gallery import card_views, gathered, group_views
from tarsift.pipelines.report.pictures import LARGE, Thumbnail, thumbnail
from tarsift.pipelines.report.render import render_piece

MOST = 500  # samples of a gallery
BINS = 80


@dataclass(frozen=True, repr=False)
class Shown:
    """A piece of HTML that a notebook displays; pictures in it are blurred until the mouse is over them.

    It runs no script and loads nothing, and text by strangers is text in it.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Shown(HTML of {len(self.html):,} characters)"


def gallery(
    samples: Iterable[Mapping[str, Any]],
    *,
    image: str = "image",
    caption: str | None = "caption",
    values: Sequence[str] = ("suspicion",),
) -> Shown:
    """Show samples as cards: the picture, the caption, and some values.

    Args:
        samples: rows, as `Dataset.take` gives them; the first 500 are shown.
        image, caption: names of the columns; images as `score_dataset` takes them.
        values: further columns to show; those that a row lacks, and nulls, are left out.

    Raises:
        UsageError: for a value that is no picture of the kinds known.

    Example:
        >>> gallery(scored.sort("suspicion", descending=True).take(12))  # doctest: +SKIP
    """
    shown, missing = [], {}
    with IsolatedDecoder(config=ImageConfig()) as decode, strict_pillow(ImageConfig().max_pixels):
        for number, row in enumerate(islice(samples, MOST)):
            thumb = _thumbnail(row.get(image), decode)
            if isinstance(thumb, str):
                missing[thumb] = missing.get(thumb, 0) + 1
            said = [(name, _short(row[name])) for name in values if row.get(name) is not None]
            shown.append(
                {
                    "thumb": None if isinstance(thumb, str) else thumb,
                    "shard": row.get("shard", "sample"),
                    "row": row.get("row", number),
                    "caption": None if caption is None else row.get(caption),
                    "said": said,
                }
            )
    note = "" if shown else "No sample."
    return Shown(render_piece("shown.html", {"samples": shown, "missing": missing, "note": note}))


def flagged_samples(out: str, *, samples: int = 12, neighbors: int = 4) -> Shown:
    """Show the samples of a result folder with the highest scores, each with its nearest neighbours.

    Neighbours are those of the embeddings of the first encoder, among suspects and among random kept samples.

    Args:
        out: result folder of `clean`, whose shards are where they were.
        samples: how many.
        neighbors: of either kind.

    Raises:
        UsageError: if `out` is no result folder, or was not scored and flagged yet.
    """
    config = ReportConfig(samples=samples, neighbors=neighbors, groups=0)
    _, evidence, nearest, thumbs = gathered(out, config=config)
    cards = card_views(evidence, nearest, thumbs)
    note = f"The {len(cards)} samples of highest {evidence.score}." if cards else "No sample was scored."
    return Shown(render_piece("shown.html", {"cards": cards, "missing": thumbs.missing, "note": note}))


def flagged_groups(out: str, *, groups: int = 8, strip: int = 12) -> Shown:
    """Show groups of flagged samples that look alike: tighter than the dump around them (see `report/looks.py`).

    Args:
        out: result folder of `clean`, whose shards are where they were.
        groups: at most so many.
        strip: pictures of a group.

    Raises:
        UsageError: if `out` is no result folder, or was not scored and flagged yet.
    """
    config = ReportConfig(samples=0, neighbors=0, groups=groups, strip=strip)
    _, evidence, _, thumbs = gathered(out, config=config)
    found = group_views(evidence, thumbs, config)["look"]
    note = "" if found else "No group of flagged images lies closer together than the dump around it."
    content = {"groups": found, "score": evidence.score, "shards": len(evidence.overview["shards"])}
    return Shown(render_piece("shown.html", {**content, "missing": thumbs.missing, "note": note}))


def drawn(charts: Mapping[str, Markup]) -> Shown:
    """Show charts, such as those of `distribution` and `report/charts.py`, below each other, by their titles."""
    return Shown(render_piece("shown.html", {"charts": list(charts.items())}))


def distribution(
    name: str,
    scores: Float[np.ndarray, " n"],
    marked: Bool[np.ndarray, " n"],
    *,
    groups: tuple[str, str] = ("kept", "flagged"),
    cutoff: float | None = None,
) -> Markup:
    """Draw the distribution of a score in two groups of samples, on a logarithmic scale of counts.

    Args:
        name: of the score.
        scores: one per sample; NaN are left out.
        marked: which samples are of the second group.
        groups: what the two are.
        cutoff: drawn as a line where given.
    """
    there = np.isfinite(scores)
    low, high = (float(scores[there].min()), float(scores[there].max())) if there.any() else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    first, second = (np.histogram(scores[there & mask], edges)[0] for mask in (~marked, marked))
    return histogram_svg(Histogram(name, low, float(edges[-1]), first, second, cutoff=cutoff, groups=groups))


def _thumbnail(value: Any, decode: Any) -> Thumbnail | str:
    """Make a small picture, or say why there is none."""
    picture = picture_of(value)
    if picture is None:
        return "missing_image"
    try:
        pixels = decode(picture) if isinstance(picture, bytes) else np.asarray(picture.convert("RGB"))
        return thumbnail(pixels, LARGE)
    except UnusableImage as unusable:
        return unusable.reason


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
