"""The encoder check: by the digests of shards, whatever their names."""

import re

import pytest

from tarsift.operators.encoder_settings import EncoderInfo
from tarsift.operators.regime import encoder_regime


def info(trained_on: dict[str, str] | None, steps: int | None = 70, unknown_base: str | None = None) -> EncoderInfo:
    return EncoderInfo(
        name="enc.pt",
        weights_sha256="00",
        embed_dim=64,
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        interpolation="bicubic",
        resize_mode="shortest",
        context_length=32,
        trained_on=trained_on,
        steps=steps,
        unknown_base=unknown_base,
    )


DUMP = {"00000": "aa", "00001": "bb", "00002": "cc", "00003": "dd"}

CASES = {
    "the same shards": (DUMP, DUMP, "trained_on_this_dump", 1.0),
    "more shards than the dump has": ({**DUMP, "00009": "ee"}, DUMP, "trained_on_this_dump", 1.0),
    "under other names": ({"x/" + k: v for k, v in DUMP.items()}, DUMP, "trained_on_this_dump", 1.0),
    "a copy of a shard in the dump": ({"00000": "aa"}, {"a": "aa", "b": "aa"}, "trained_on_this_dump", 1.0),
    "one of four": ({"00002": "cc"}, DUMP, "partly", 0.25),
    "three of four": ({"0": "aa", "1": "bb", "2": "cc"}, DUMP, "partly", 0.75),
    "the same names, other bytes": ({k: v + "0" for k, v in DUMP.items()}, DUMP, "not_trained_on_this_dump", 0.0),
    "other shards": ({"x": "11"}, DUMP, "not_trained_on_this_dump", 0.0),
    "no shards at all": ({}, DUMP, "not_trained_on_this_dump", 0.0),
    "an encoder without a record": (None, DUMP, "unknown", None),
    "a dump without digests": (DUMP, None, "unknown", None),
    "an empty dump": (DUMP, {}, "unknown", None),
}


@pytest.mark.parametrize("case", CASES)
def test_regime(case):
    trained_on, dump, code, share = CASES[case]
    regime = encoder_regime(info(trained_on), dump)
    assert (regime.code, regime.share) == (code, share)
    assert "enc.pt" in regime.sentence
    assert regime.sentence.endswith(".")
    assert regime.blind_to.endswith(".")


def test_sentences_count():
    assert "2 of this dump's 4 shards, for 70 steps" in encoder_regime(info({"a": "aa", "b": "bb"}), DUMP).sentence
    assert "in the 1 shard it was" in encoder_regime(info({"0": "aa", "1": "bb", "2": "cc"}), DUMP).blind_to
    assert "steps" not in encoder_regime(info(DUMP, steps=None), DUMP).sentence
    same_names = encoder_regime(info({k: v + "0" for k, v in DUMP.items()}), DUMP).sentence
    assert "4 of them have the name" in same_names
    assert "name" not in encoder_regime(info({"x": "11"}), DUMP).sentence
    assert "pretrain" in encoder_regime(info({"x": "11"}), DUMP).blind_to


@pytest.mark.parametrize(
    ("trained_on", "code", "said"),
    [
        (DUMP, "trained_on_this_dump", "on all 4 shards"),
        ({"0": "aa", "1": "bb"}, "unknown", "from RN50:b.pt, whose file .* and saw 2 of this dump's 4 shards"),
        ({"x": "11"}, "unknown", "saw none of this dump's 4 shards"),
    ],
)
def test_a_base_that_does_not_say_what_it_has_seen(trained_on, code, said):
    regime = encoder_regime(info(trained_on, None, "RN50:b.pt"), DUMP)
    assert regime.code == code
    assert re.search(said, regime.sentence)
