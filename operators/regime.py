"""The encoder check: was this encoder trained on this dump, and what can a run with it not see?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tarsift.operators.encoder_settings import EncoderInfo

RegimeCode = Literal["trained_on_this_dump", "partly", "not_trained_on_this_dump", "unknown"]


@dataclass(frozen=True)
class Regime:
    """Whether the encoder was trained on the dump under test, which decides what its scores can see.

    `share` is the fraction of the dump's shards that it was trained on, None where that is unknown.
    `sentence` states the regime and `blind_to` what a run with this encoder therefore misses.
    """

    code: RegimeCode
    share: float | None
    sentence: str
    blind_to: str


def encoder_regime(info: EncoderInfo, shard_digests: Mapping[str, str] | None) -> Regime:
    """Compare the shards that an encoder was trained on with those of a dump, by SHA-256.

    Density scores see only what the encoder has learned: a backdoor becomes a sparse cluster of its
    own in the space of a model that was trained on it, and is spread over the clean images in any
    other. The cosine of image and caption is the opposite: an encoder that learned the poison
    agrees with it. Where training went on from another encoder, the shards that this one had seen
    count as well; if it does not say which, a dump not wholly seen since is a case of unknown.

    Args:
        info: from `encoder_info`.
        shard_digests: SHA-256 of every shard file of the dump, by name; None where not known.
    """
    if info.trained_on is None or not shard_digests:
        why = (
            "its file does not say what it was trained on"
            if info.trained_on is None
            else "the digests of the dump's shards are not known before they are read"
        )
        return Regime(
            "unknown",
            None,
            f"Whether the encoder {info.name} was trained on this dump is unknown: {why}.",
            "any backdoor, unless the encoder was trained on this very dump: density scores see only what the encoder "
            "has learned, and finding little proves nothing.",
        )
    seen = set(info.trained_on.values())
    known = sum(digest in seen for digest in shard_digests.values())
    total = len(shard_digests)
    share = known / total
    if known == total:
        return Regime(
            "trained_on_this_dump",
            share,
            f"The encoder {info.name} was trained on this dump: on all {_shards(total)}{_steps(info)}.",
            "poison that the encoder has not learned, as after too few steps or with too faint a trigger; and captions "
            "that do not fit their images, where training taught the encoder that they do.",
        )
    if info.unknown_base is not None:
        return Regime(
            "unknown",
            None,
            f"Whether the encoder {info.name} was trained on this dump is unknown: training went on from "
            f"{info.unknown_base}, whose file does not say what it was trained on, and saw "
            f"{known or 'none'} of this dump's {_shards(total)}{_steps(info)}.",
            "any backdoor in a shard that it was not trained on: density scores see only what the encoder has learned, "
            "and finding little proves nothing.",
        )
    if known:
        return Regime(
            "partly",
            share,
            f"The encoder {info.name} was trained on {known} of this dump's {_shards(total)}{_steps(info)}.",
            f"backdoors that occur only in the {_shards(total - known)} it was not trained on, and poison that it has "
            "not learned.",
        )
    renamed = len(set(info.trained_on) & set(shard_digests))
    return Regime(
        "not_trained_on_this_dump",
        share,
        f"The encoder {info.name} was not trained on this dump: on none of its {_shards(total)}"
        + (f" ({renamed} of them have the name of one that it was trained on, and other bytes)." if renamed else "."),
        "backdoors in the images: density scores see only what the encoder has learned, and are little better than "
        "chance here. Captions that do not fit their images it can see. Train an encoder on this dump with "
        "`tarsift pretrain`.",
    )


def _shards(count: int) -> str:
    return f"{count} shard{'s' if count != 1 else ''}"


def _steps(info: EncoderInfo) -> str:
    return "" if info.steps is None else f", for {info.steps} steps"
