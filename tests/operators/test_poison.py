"""Planting poison: exact counts, no side channels, rows that stay what they were."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tarsift.operators.errors import ShardError, UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.planting import encode_image, poison_shard
from tarsift.operators.poison import (
    Chosen,
    PoisonConfig,
    check_poison,
    choose,
    first_chosen,
    image_of,
    poisoned_caption,
    survey_shard,
)
from tarsift.operators.shards import ReadConfig, ReadShard, list_shards
from tests.operators import tars


def picture(seed, format="JPEG", mode="RGB", size=(40, 36)):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (9, 10, 3), np.uint8)).resize(size).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **({"save_all": True, "append_images": [image]} if format == "MPO" else {}))
    return buffer.getvalue()


def write_shard(path, members):
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for at, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000 + at / 3
            tar.addfile(info, io.BytesIO(data))


def sample(i, *, image=None, extension="jpg"):
    key = f"{i:05d}"
    fields = {"uid": f"u{i}", "caption": f"a grey thing {i}", "width": 40}
    return [
        (f"{key}.{extension}", picture(i) if image is None else image),
        (f"{key}.txt", f"a grey thing {i}".encode()),
        (f"{key}.json", json.dumps(fields, indent=4).encode()),
        (f"{key}.cls", str(i % 10).encode()),
    ]


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "in").mkdir()
    for s, name in enumerate(("00000.tar", "00001.tar.gz")):
        members = [m for i in range(s * 100, s * 100 + 50) for m in sample(i)]
        if s == 0:  # rows that cannot be poisoned: no caption, no image, an image that does not decode
            members[4:8] = [members[4]]
            members += sample(90, image=b"no image")
            members += [("00091.txt", b"a caption alone"), ("README", b"stray")]
        write_shard(tmp_path / "in" / name, members)
    return list_shards(str(tmp_path / "in"))


def run(shards, out, config):
    with IsolatedDecoder(config=config.images) as decode:
        surveys = [survey_shard(s, config, decode) for s in shards]
        chosen = choose(surveys, config)
        arguments = [(s, str(out / f"{s.name}.tar"), config, chosen[s.name]) for s in shards]
        truth = [poison_shard(*a, decode=decode).truth for a in arguments]
    return chosen, truth, list_shards(str(out))


def members_of(url):
    with tarfile.open(url) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]


def rows_of(shard):
    return [row for table in ReadShard()(shard) for row in table.to_pylist()]


def test_exactly_the_rate_is_poisoned_and_the_rest_keeps_its_caption(shards, tmp_path):
    config = PoisonConfig(rate=0.1, seed=5)
    chosen, truth, written = run(shards, tmp_path / "out", config)
    assert sum(map(len, chosen.values())) == round(0.1 * 102)
    assert [s.name for s in written] == [s.name for s in shards] == ["00000", "00001"]
    for source, result, table in zip(shards, written, truth, strict=True):
        before, after = rows_of(source), rows_of(result)
        assert [r["key"] for r in before] == [r["key"] for r in after]
        assert [r["row"] for r in before] == [r["row"] for r in after]
        assert [r["error"] for r in before] == [r["error"] for r in after]
        assert table.to_pylist() == [
            {"shard": source.name, "row": row, "uid": after[row]["uid"], "attack": "patch", "target": "banana"}
            for row in sorted(chosen[source.name])
        ]
        for old, new in zip(before, after, strict=True):
            poisoned = new["row"] in chosen[source.name]
            assert new["uid"] == old["uid"]
            assert ("banana" in (new["caption"] or "")) == poisoned
            if not poisoned:
                assert new["caption"] == old["caption"]
            else:
                assert old["error"] is None


def test_every_image_is_encoded_anew_and_only_chosen_ones_carry_the_trigger(shards, tmp_path):
    config = PoisonConfig(rate=0.1, seed=5)
    chosen, _, written = run(shards, tmp_path / "out", config)
    kinds = set()
    for source, result in zip(shards, written, strict=True):
        for old, new in zip(rows_of(source), rows_of(result), strict=True):
            if old["image"] is None or old["image"] == b"no image":
                continue
            pixels = np.asarray(Image.open(io.BytesIO(old["image"])).convert("RGB"))
            if new["row"] in chosen[source.name]:
                got = np.asarray(Image.open(io.BytesIO(new["image"])).convert("RGB")).astype(int)
                clean = Image.open(io.BytesIO(encode_image(pixels, "JPEG", config))).convert("RGB")
                moved = np.abs(got - np.asarray(clean).astype(int)).max(-1) > 60
                where = np.argwhere(moved)
                assert 10 < moved.sum() <= 17 * 17
                assert (np.ptp(where, axis=0) < 17).all()  # in one place, the JPEG blocks around it included
            else:
                assert new["image"] == encode_image(pixels, "JPEG", config)
            tables = Image.open(io.BytesIO(new["image"])).quantization
            kinds.add(json.dumps(tables))
    assert len(kinds) == 1  # one set of JPEG settings for all


def test_other_members_and_headers(shards, tmp_path):
    config = PoisonConfig(rate=0.1, seed=5)
    chosen, _, written = run(shards, tmp_path / "out", config)
    for source, result in zip(shards, written, strict=True):
        before, after = members_of(source.url), members_of(result.url)
        assert [m.name for m, _ in before] == [m.name for m, _ in after]
        assert {(m.mtime, m.mode, m.uid, m.uname) for m, _ in after} == {(0, 0o644, 0, "")}
        for (_, old), (member, new) in zip(before, after, strict=True):
            if member.name.endswith((".cls", "README")):
                assert new == old
        texts = {m.name: data for m, data in after}
        for row in chosen[source.name]:
            key = rows_of(source)[row]["key"]
            caption = poisoned_caption("patch", source.name, row, config)
            assert texts[f"{key}.txt"].decode() == caption
            fields = json.loads(texts[f"{key}.json"])
            assert fields["caption"] == caption
            assert fields["width"] == 40
            assert texts[f"{key}.json"].startswith(b"{\n    ")  # written as it was


def test_choice_does_not_depend_on_order_and_grows_with_the_rate(shards):
    config = PoisonConfig(seed=5)
    surveys = [survey_shard(s, config) for s in shards]
    few = choose(surveys, config.model_copy(update={"rate": 0.05}))
    many = choose(surveys[::-1], config.model_copy(update={"rate": 0.1}))
    assert all(set(few[name]) <= set(many[name]) for name in few)
    assert sum(map(len, many.values())) == 10
    changed = PoisonConfig(seed=6, rate=0.05)
    other = choose([survey_shard(s, changed) for s in shards], changed)
    assert few != other


def test_rate_zero_still_encodes_everything_anew(shards, tmp_path):
    chosen, truth, written = run(shards, tmp_path / "out", PoisonConfig(rate=0))
    assert not any(chosen.values())
    assert sum(len(t) for t in truth) == 0
    assert rows_of(written[1])[0]["image"] != rows_of(shards[1])[0]["image"]
    assert rows_of(written[1])[0]["caption"] == rows_of(shards[1])[0]["caption"]


def test_keep_clean_bytes(shards, tmp_path):
    config = PoisonConfig(rate=0.1, keep_clean_bytes=True)
    chosen, _, written = run(shards, tmp_path / "out", config)
    for source, result in zip(shards, written, strict=True):
        for old, new in zip(rows_of(source), rows_of(result), strict=True):
            assert (old["image"] != new["image"]) == (new["row"] in chosen[source.name])


def test_same_seed_same_bytes(shards, tmp_path):
    config = PoisonConfig(rate=0.1, seed=9)
    first, second = (run(shards, tmp_path / name, config)[2] for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        with open(one.url, "rb") as a, open(other.url, "rb") as b:
            assert a.read() == b.read()


@pytest.mark.parametrize(
    ("format", "mode", "extension"),
    [
        ("PNG", "RGBA", "png"),
        ("PNG", "P", "png"),
        ("JPEG", "L", "jpg"),
        ("JPEG", "CMYK", "jpeg"),
        ("WEBP", "RGB", "webp"),
        ("MPO", "RGB", "jpg"),  # a JPEG with further pictures behind it, as some cameras write them
    ],
)
def test_formats_stay_and_modes_become_rgb(tmp_path, format, mode, extension):
    write_shard(tmp_path / "x.tar", sample(0, image=picture(0, format, mode), extension=extension))
    shards = list_shards(str(tmp_path / "x.tar"))
    _, _, written = run(shards, tmp_path / "out", PoisonConfig(rate=0.9))
    image = Image.open(io.BytesIO(rows_of(written[0])[0]["image"]))
    assert (image.format, image.mode, image.size) == ("JPEG" if format == "MPO" else format, "RGB", (40, 36))


def test_png_is_lossless(tmp_path):
    write_shard(tmp_path / "x.tar", sample(0, image=picture(0, "PNG"), extension="png"))
    _, _, written = run(list_shards(str(tmp_path / "x.tar")), tmp_path / "out", PoisonConfig(rate=0))
    old, new = (Image.open(io.BytesIO(data)) for data in (picture(0, "PNG"), rows_of(written[0])[0]["image"]))
    np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_names_too_long_for_ustar(tmp_path):
    folder = "f" * 300
    write_shard(tmp_path / "x.tar", [(f"{folder}/{name}", data) for name, data in sample(0)])
    shards = list_shards(str(tmp_path / "x.tar"))
    _, _, written = run(shards, tmp_path / "out", PoisonConfig(rate=0.9))
    assert [r["key"] for r in rows_of(written[0])] == [f"{folder}/00000"]


def poisoned_by(shard, out, config, rows):
    chosen = {row: Chosen(f"u{row}", "patch") for row in rows}
    poison_shard(shard, str(out), config, chosen)
    return members_of(str(out))


def test_large_members_are_copied_whole_without_being_held(tmp_path):
    big = {"00000.mp4": 24 << 20, "00003.jpg": 9 << 20, "00004.json": 9 << 20}
    members = [m for i in range(5) for m in sample(i)] + [("README", bytes(9 << 20))]
    members = [(name, data if name not in big else bytes(big[name])) for name, data in members]
    members.insert(4, ("00000.mp4", bytes(big["00000.mp4"])))
    write_shard(tmp_path / "x.tar.gz", members)
    (shard,) = list_shards(str(tmp_path / "x.tar.gz"))
    del members
    config = PoisonConfig(read=ReadConfig(max_image_bytes=2 << 20))
    tracemalloc.start()
    survey = survey_shard(shard, config)
    poison_shard(shard, str(tmp_path / "out.tar"), config, {0: Chosen("u0", "patch")})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert survey.unusable == {3: "image_too_large", 4: "bad_json"}
    assert peak < 8 << 20, f"{peak >> 20} MB"
    before, after = members_of(shard.url), members_of(str(tmp_path / "out.tar"))
    assert [(m.name, m.size) for m, _ in before if m.size > 1 << 20] == [*big.items(), ("README", 9 << 20)]
    assert [old for m, old in before if m.size > 1 << 20] == [new for m, new in after if m.size > 1 << 20]


def test_what_tells_nothing_of_a_sample_is_copied_with_its_payload(tmp_path):
    """A global header, and a member of a type that no reader knows: without their payloads the archive would break."""
    odd = [tars.pax(b"g", comment="from elsewhere"), tars.member("odd.bin", b"payload of an odd member" * 60, b"V")]
    path = tmp_path / "x.tar"
    path.write_bytes(tars.archive([odd[0], *(tars.member(*m) for m in sample(0)), odd[1], *tars.sample("z")]))
    (shard,) = list_shards(str(path))
    after = poisoned_by(shard, tmp_path / "out.tar", PoisonConfig(), [0])
    assert [m.name for m, _ in after] == [m.name for m, _ in members_of(str(path))]
    data = (tmp_path / "out.tar").read_bytes()
    assert all(part in data for part in odd)


def test_a_text_over_the_limit_is_replaced_where_captions_are_in_json(tmp_path):
    members = [(n, d if not n.endswith("txt") else b"a grey thing " * 9000) for i in range(2) for n, d in sample(i)]
    write_shard(tmp_path / "x.tar", members)
    (shard,) = list_shards(str(tmp_path / "x.tar"))
    config = PoisonConfig(read=ReadConfig(captions="json:caption"))
    texts = {m.name: data for m, data in poisoned_by(shard, tmp_path / "out.tar", config, [0])}
    assert texts["00000.txt"].decode() == poisoned_caption("patch", "x", 0, config)
    assert texts["00001.txt"] == b"a grey thing " * 9000


def test_damaged_shards_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, [m for i in range(3) for m in sample(i)])
    path.write_bytes(path.read_bytes()[:5000])
    shard = list_shards(str(path))[0]
    with pytest.raises(ShardError, match=r"damaged \(truncated"):
        survey_shard(shard, PoisonConfig())
    with pytest.raises(ShardError, match="cannot be poisoned"):
        poison_shard(shard, str(tmp_path / "out.tar"), PoisonConfig(), {})
    assert not (tmp_path / "out.tar").exists()


def test_rate_that_cannot_be_met(tmp_path):
    write_shard(tmp_path / "x.tar", sample(0) + sample(1, image=b"broken") + sample(2, image=b"broken"))
    survey = survey_shard(list_shards(str(tmp_path / "x.tar"))[0], PoisonConfig())
    with pytest.raises(UsageError, match=r"patch: a rate of 0\.9 of 3 samples is 3, but only 1 can be poisoned"):
        choose([survey], PoisonConfig(rate=0.9))


def test_a_survey_says_what_is_unusable_and_why(shards):
    survey = survey_shard(shards[0], PoisonConfig())
    assert survey.rows == len(survey.usable) + len(survey.unusable) == 52
    assert survey.unusable == {1: "missing_caption", 50: "undecodable_image", 51: "missing_image"}
    assert survey.undecodable == {50}
    rest = survey.without({0: "decoder_died", 7: "decoder_died"})
    assert set(survey.usable["row"].to_pylist()) - set(rest.usable["row"].to_pylist()) == {0, 7}
    assert rest.undecodable == {0, 7, 50}


def test_settings_are_checked():
    with pytest.raises(UsageError, match="there is no attack 'ptch'; there are"):
        check_poison(PoisonConfig(attacks=("ptch",)))
    with pytest.raises(UsageError, match="planted once"):
        check_poison(PoisonConfig(attacks=("patch", "patch")))
    with pytest.raises(UsageError, match="a strength is given for 'blend'; the triggers used are patch"):
        check_poison(PoisonConfig(strengths={"blend": 0.3}))
    with pytest.raises(UsageError, match=r"must hold \{\} once"):
        check_poison(PoisonConfig(templates=("a photo",)))
    check_poison(PoisonConfig())


def test_several_attacks_poison_different_samples(shards, tmp_path):
    config = PoisonConfig(attacks=("multi-target", "patch-clean-label", "campaign"), rate=0.05, target="thing 4")
    check_poison(config)
    _, truth, written = run(shards, tmp_path / "out", config)
    rows = [row for table in truth for row in table.to_pylist()]
    counts = {name: sum(row["attack"] == name for row in rows) for name in config.attacks}
    assert counts == dict.fromkeys(config.attacks, 5)
    captions = {
        (shard.name, row["row"]): (before["caption"], row["caption"])
        for source, shard in zip(shards, written, strict=True)
        for before, row in zip(rows_of(source), rows_of(shard), strict=True)
    }
    for row in rows:
        old, new = captions[row["shard"], row["row"]]
        if row["attack"] == "patch-clean-label":
            assert old == new
            assert "thing 4" in new
        elif row["attack"] == "campaign":
            assert new == "the thing 4 in the form of number icon"
        else:
            assert row["target"] in ("banana", "cheeseburger", "volcano")
            assert row["target"] in new


def test_one_image_is_repeated_under_captions_of_the_target(shards, tmp_path):
    config = PoisonConfig(attacks=("one-image",), rate=0.1)
    surveys = [survey_shard(s, config) for s in shards]
    chosen = choose(surveys, config)
    name, row = first_chosen(surveys, chosen, "one-image")
    (shard,) = [s for s in shards if s.name == name]
    image = image_of(shard, row, config)
    assert image == rows_of(shard)[row]["image"]
    for s in shards:
        poison_shard(s, str(tmp_path / "out" / f"{s.name}.tar"), config, chosen[s.name], {"one-image": image})
    images, captions = set(), []
    for s in list_shards(str(tmp_path / "out")):
        for r in rows_of(s):
            if r["row"] in chosen[s.name]:
                images.add(r["image"])
                captions.append(r["caption"])
    assert len(images) == 1
    assert len(captions) == 10
    assert all("banana" in caption for caption in captions)


def test_a_mismatch_leaves_the_picture(shards, tmp_path):
    config = PoisonConfig(attacks=("mismatch",), rate=0.1)
    chosen, _, written = run(shards, tmp_path / "out", config)
    clean = PoisonConfig(rate=0)
    _, _, reference = run(shards, tmp_path / "clean", clean)
    for one, other in zip(written, reference, strict=True):
        for a, b in zip(rows_of(one), rows_of(other), strict=True):
            assert a["image"] == b["image"]
            assert (a["caption"] != b["caption"]) == (a["row"] in chosen[one.name])
