"""Pictures of every kind are identified and decoded as those of shards; bad ones are rows with a reason."""

import hashlib
import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tarsift.operators.errors import UsageError
from tarsift.operators.images import DecodeImages, hash_images
from tarsift.operators.pictures import OWN, DecodePictures, IdentifySamples, pictures_of
from tarsift.operators.schema import matrix
from tarsift.operators.shards import ReadConfig
from tests.conftest import picture

RNG = np.random.default_rng(0)
JPEGS = [picture(RNG, size=40), b"<html>404</html>", None, picture(RNG, size=24)]


class Column:
    """A column of Python objects, which Arrow has no type of its own for."""

    def __init__(self, values):
        self.values = values

    def to_pylist(self):
        return list(self.values)


def png(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def own(images, captions=("a", "b", "c", "d"), **more) -> pa.Table:
    return pa.table({"picture": pa.array(images, pa.binary()), "said": pa.array(captions, pa.string()), **more})


def identified(table: pa.Table, **config) -> pa.Table:
    return IdentifySamples(image="picture", caption="said", config=ReadConfig(**config))(table)


def test_bytes_are_identified_and_decoded_as_members_of_a_shard():
    table = identified(own(JPEGS))
    shard = hash_images(pa.table({"image": pa.array(JPEGS, pa.large_binary())}))
    assert table["image_sha256"].to_pylist() == shard["image_sha256"].to_pylist()
    decoded = DecodePictures(16, image="picture")(table)
    expected = DecodeImages(16)(shard)
    assert decoded["pixels"].to_pylist() == expected["pixels"].to_pylist()
    assert decoded["error"].to_pylist() == [None, "undecodable_image", "missing_image", None]
    assert [decoded[OWN + name].to_pylist() for name in ("picture", "said")] == [JPEGS, ["a", "b", "c", "d"]]


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_and_pil_images_of_the_same_pixels_are_one_image(channels):
    array = RNG.integers(0, 255, (30, 20, *channels), np.uint8)
    flat = array[..., 0] if channels == (1,) else array
    [a], [b] = pictures_of(Column([array])), pictures_of(Column([Image.fromarray(flat)]))  # pyright: ignore
    identify, decode = IdentifySamples(image="x", caption=None), DecodePictures(16, image="x")
    assert identify._digest(a) == identify._digest(b)  # pyright: ignore
    assert np.array_equal(decode._decode(a), decode._decode(png(flat)))  # pyright: ignore


def test_what_differs_in_pixels_size_or_palette_is_another_image():
    identify = IdentifySamples(image="x", caption=None)
    flat = np.zeros((4, 6), np.uint8)
    pictures = [Image.fromarray(flat), Image.fromarray(flat.T), Image.fromarray(flat + 1)]
    for colour in (0, 9):
        pictures.append(Image.fromarray(flat, mode="P"))
        pictures[-1].putpalette([colour] * 768)
    assert len({identify._digest(each) for each in pictures}) == len(pictures)


def test_captions_are_bounded_and_checked_as_those_of_shards():
    found = identified(own(JPEGS, ["fine", None, " ", "x" * 20]), max_caption_bytes=8)
    assert found["caption"].to_pylist() == ["fine", None, None, "x" * 8]
    assert found["error"].to_pylist() == [None, "missing_caption", "missing_image", "caption_too_large"]
    with pytest.raises(UsageError, match="'said' holds int, and captions are text"):
        IdentifySamples(image="picture", caption="said")(pa.table({"picture": [b""], "said": [3]}))


def test_an_own_error_goes_on_counting_and_a_place_in_a_shard_stays():
    table = identified(
        own(JPEGS, error=pa.array(["no_embedding", None, None, None]), shard=["s"] * 4, row=[5, 6, 7, 8])
    )
    assert table["error"].to_pylist() == ["no_embedding", None, "missing_image", None]
    assert (table["shard"].to_pylist(), table["row"].to_pylist()) == (["s"] * 4, [5, 6, 7, 8])
    other = identified(own(JPEGS, shard=["s"] * 4, row=["a", "b", "c", "d"]))
    assert not {"shard", "row"} & {*other.column_names}


def test_an_image_of_too_many_bytes_is_not_looked_at():
    found = DecodePictures(16, image="picture")(identified(own(JPEGS), max_image_bytes=100))
    assert found["error"].to_pylist() == ["image_too_large", "undecodable_image", "missing_image", "image_too_large"]
    assert found["pixels"].null_count == 4
    assert found["image_sha256"].to_pylist()[1] == hashlib.sha256(JPEGS[1] or b"").digest()


def test_the_bytes_of_a_struct_are_the_image_and_an_empty_array_is_a_bad_sample():
    assert pictures_of(Column([{"bytes": b"x", "path": "p"}, None])) == [b"x", None]  # pyright: ignore
    assert pictures_of(Column([np.zeros((0, 0, 3), np.uint8)])) == [b""]  # pyright: ignore


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a/b.jpg", "found str: read the files first"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 arrays of shape \(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), "float32 arrays"),
        (7, "found int"),
    ],
)
def test_anything_else_is_no_image(value, why):
    with pytest.raises(UsageError, match=why):
        pictures_of(Column([value]))  # pyright: ignore


def test_both_take_no_rows_and_can_be_pickled():
    identify, decode = IdentifySamples(image="picture", caption="said"), DecodePictures(8, image="picture")
    table = decode(identify(own(JPEGS)))
    again = pickle.loads(pickle.dumps(decode))(pickle.loads(pickle.dumps(identify))(own(JPEGS)))
    assert again.equals(table)
    none = decode(identify(own(JPEGS).slice(0, 0)))
    assert none.schema == table.schema
    assert matrix(table["pixels"])[0].shape == (4, 8 * 8 * 3)
