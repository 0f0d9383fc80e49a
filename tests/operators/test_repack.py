"""Samples written as a shard of their own: the same bytes and captions, in the order asked for, found where it says."""

import json

import pytest

from tarsift.operators.repack import Taken, write_samples
from tarsift.operators.shards import ReadConfig, ReadShard, fetch_member, list_shards
from tests.conftest import write_shard


@pytest.mark.parametrize("captions", ["txt", "json:said"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_samples_of_several_shards_are_read_back_as_they_were(tmp_path, captions, mode):
    images = [b"\xff\xd8" + bytes([i]) * (700 + i) for i in range(8)]
    images[3] = b"\x89PNG" + bytes(50)
    texts = [f"caption {i} é" for i in range(8)]
    rows = [
        {
            "jpg": image,
            **({"txt": text.encode()} if captions == "txt" else {"json": json.dumps({"said": text}).encode()}),
        }
        for image, text in zip(images, texts, strict=True)
    ]
    suffix = ".gz" if mode == "w:gz" else ""
    write_shard(tmp_path / f"a.tar{suffix}", rows[:5], first=0, mode=mode)
    write_shard(tmp_path / f"b.tar{suffix}", rows[5:], first=5, mode=mode)
    read = ReadShard(ReadConfig(captions=captions))
    found = [
        Taken(shard, row["image_offset"], row["image_size"], row["caption"])
        for shard in list_shards(str(tmp_path))
        for table in read(shard)
        for row in table.to_pylist()
    ]
    order = [6, 0, 3, 7, 1]
    taken = [found[i] for i in order]
    taken[-1] = taken[-1]._replace(caption=None)
    places = write_samples(taken, str(tmp_path / "out" / "0.tar"), captions)
    [shard] = list_shards(str(tmp_path / "out" / "0.tar"))
    again = [row for table in read(shard) for row in table.to_pylist()]
    assert [row["caption"] for row in again] == [texts[i] for i in order[:-1]] + [None]
    assert [(row["image_offset"], row["image_size"]) for row in again] == [tuple(place) for place in places.tolist()]
    for (offset, size), i in zip(places.tolist(), order, strict=True):
        assert fetch_member(shard, offset, size) == images[i]
