"""The encoder as a map: embeddings are open_clip's own, and a sample's depend on that sample alone."""

import dataclasses
import io
import pickle
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from pydantic import ValidationError

from tarsift.operators.encoder import ClipEncoder
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.errors import END_OF_SHARD, ConfigError, TarsiftError, UsageError
from tarsift.operators.images import DecodeImages
from tarsift.operators.models import build_model, load_encoder, model_config, save_checkpoint
from tarsift.operators.schema import SAMPLE_SCHEMA, matrix
from tests.operators.test_images import IMAGES, JPEG, encoded, picture, rows

APPENDED = ["image_embedding", "image_norm", "text_embedding", "clip_similarity"]
FLOAT16_UNIT = 2.0**-10  # one unit in the last of float16's places, as a fraction


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("encoder") / "enc.pt")
    model = build_model("tiny", seed=5)
    save_checkpoint(
        path, model, config=model_config("tiny"), shards={"a": "11", "b": "22"}, steps=40, samples=9, seed=5
    )
    return path


@pytest.fixture(scope="module")
def encode(spec) -> ClipEncoder:
    return ClipEncoder(spec, micro_batch=16)


def with_model(operator: ClipEncoder, encode_image) -> ClipEncoder:
    """Return the operator with a stand-in for the image tower."""
    copy = pickle.loads(pickle.dumps(operator))
    text = copy.encoder.model.encode_text

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode_image(self, images, normalize):
            assert normalize is False
            return encode_image(images)

        def encode_text(self, tokens, normalize):
            return text(tokens, normalize=normalize)

    copy.encoder = dataclasses.replace(copy.encoder, model=Model())
    return copy


def many(n: int) -> pa.Table:
    table = rows(*[encoded(picture(40 + i % 7, 36 + i % 5, seed=i)) for i in range(n)])
    captions = pa.array([f"a photo of the number {i % 11} and of {i * i}" for i in range(n)])
    return table.set_column(table.schema.get_field_index("caption"), "caption", captions)


def by_open_clip(spec: str, images: list[bytes]) -> np.ndarray:
    encoder = load_encoder(spec)
    transform = image_transform(encoder.image_size, is_train=False, mean=encoder.mean, std=encoder.std)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        batch = torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])
        return encoder.model.encode_image(batch).numpy()


def test_embeddings_are_those_of_open_clip(spec, encode):
    images = list(IMAGES.values())
    embeddings, valid = matrix(encode(rows(*images))["image_embedding"])
    assert valid.all()
    assert embeddings.dtype == np.float16
    np.testing.assert_allclose(embeddings, by_open_clip(spec, images), rtol=FLOAT16_UNIT, atol=1e-6)


def test_caption_embeddings_are_those_of_open_clip(spec, encode):
    captions = ["a cat", "", "été 猫 \x00 <b>", "word " * 200]
    table = encode(pa.table({"image": pa.array([JPEG] * 4, pa.large_binary()), "caption": captions}))
    encoder = load_encoder(spec)
    with torch.inference_mode():
        expected = encoder.model.encode_text(encoder.tokenizer(captions)).numpy()
    np.testing.assert_allclose(matrix(table["text_embedding"])[0], expected, rtol=FLOAT16_UNIT, atol=1e-6)


def test_measures_are_those_of_the_stored_embeddings(encode):
    table = encode(many(20))
    image, text = (matrix(table[c])[0].astype(np.float64) for c in ("image_embedding", "text_embedding"))
    norm = np.linalg.norm(image, axis=1)
    np.testing.assert_allclose(table["image_norm"].to_numpy(), norm, rtol=1e-6)
    cosine = (image * text).sum(1) / norm / np.linalg.norm(text, axis=1)
    np.testing.assert_allclose(table["clip_similarity"].to_numpy(), cosine, atol=1e-6)


@pytest.mark.parametrize("part", [1, 7, 16, 50])
def test_an_embedding_depends_neither_on_the_batch_nor_on_the_order(spec, part):
    encode = ClipEncoder(spec, micro_batch=16, store="float32")
    table = many(50)
    whole = encode(table).select(["row", *APPENDED])
    shuffled = table.take(np.random.default_rng(part).permutation(50))
    parts = pa.concat_tables([encode(shuffled.slice(at, part)) for at in range(0, 50, part)])
    in_order = parts.select(["row", *APPENDED]).take(np.argsort(parts["row"].to_numpy()))
    for name in ("image_embedding", "text_embedding"):
        assert matrix(whole[name])[0].tobytes() == matrix(in_order[name])[0].tobytes()
    assert whole.select(["row", "image_norm", "clip_similarity"]).equals(
        in_order.select(["row", "image_norm", "clip_similarity"])
    )


def test_another_micro_batch_differs_by_at_most_a_unit_in_the_last_place(spec, encode):
    table = many(20)
    other = ClipEncoder(spec, micro_batch=5)(table)
    for name in ("image_embedding", "text_embedding"):
        expected = matrix(encode(table)[name])[0]
        np.testing.assert_allclose(matrix(other[name])[0], expected, rtol=FLOAT16_UNIT, atol=1e-6)


@pytest.mark.parametrize("n", [0, 3])
def test_encoding_is_a_map(encode, n):
    table = many(n)
    out = pickle.loads(pickle.dumps(encode))(table)
    assert out.column_names == [*table.column_names, *APPENDED]
    assert out.select(table.column_names).equals(table)
    assert out.schema.field("image_embedding").type == pa.list_(pa.float16(), 64)
    assert out.schema.field("text_embedding").type == pa.list_(pa.float16(), 64)
    assert out.schema.field("image_norm").type == out.schema.field("clip_similarity").type == pa.float32()
    assert out.equals(encode(table))


def test_pixels_are_taken_where_they_are_and_dropped(encode):
    table = many(5)
    out = encode(DecodeImages(32)(table))
    assert out.column_names == [*(c for c in SAMPLE_SCHEMA.names if c != "image"), *APPENDED]
    assert out.equals(encode(table).drop_columns(["image"]))


def test_what_is_missing_stays_null(encode):
    table = rows(
        JPEG, None, b"broken", JPEG, None, errors=[None, "missing_image", None, "missing_caption", END_OF_SHARD]
    )
    captions = pa.array(["a cat", "a dog", "a cow", None, None], pa.string())
    out = encode(table.set_column(table.schema.get_field_index("caption"), "caption", captions))
    valid = {name: out[name].is_valid().to_pylist() for name in APPENDED}
    assert valid["image_embedding"] == valid["image_norm"] == [True, False, False, True, False]
    assert valid["text_embedding"] == [True, True, True, False, False]
    assert valid["clip_similarity"] == [True, False, False, False, False]
    assert out["error"].to_pylist() == [None, "missing_image", "undecodable_image", "missing_caption", END_OF_SHARD]
    alone = encode(rows(JPEG))
    assert matrix(out["image_embedding"])[0][3].tobytes() == matrix(alone["image_embedding"])[0][0].tobytes()


def test_a_batch_with_nothing_to_encode(encode):
    out = encode(rows(None, errors=[END_OF_SHARD]).set_column(7, "caption", pa.nulls(1, pa.string())))
    assert [out[name].null_count for name in APPENDED] == [1, 1, 1, 1]


def test_a_dict_of_arrays_is_a_batch_too(encode):
    table = many(4)
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    batch = {"image": np.array(images, object), "caption": np.array(captions), "row": np.arange(4)}
    out = encode(batch)
    assert out.column_names == ["image", "caption", "row", "error", *APPENDED]
    assert out.select(APPENDED).equals(encode(table).select(APPENDED))


def test_read_only_pixels_in_any_shape_are_a_batch_too(encode):
    table = many(4)
    pixels = matrix(DecodeImages(32)(table)["pixels"])[0].reshape(4, 32, 32, 3)
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = encode({"pixels": pixels, "caption": np.array(table["caption"].to_pylist(), object)})
    assert out.column_names == ["caption", *APPENDED]
    assert out.select(APPENDED).equals(encode(table).select(APPENDED))


def test_equal_captions_are_encoded_once(encode):
    seen: list[str] = []
    copy = pickle.loads(pickle.dumps(encode))
    tokenizer = copy.encoder.tokenizer

    def noting(captions):
        seen.extend(captions)
        return tokenizer(captions)

    copy.encoder = dataclasses.replace(copy.encoder, tokenizer=noting)
    out = copy(pa.table({"image": pa.array([JPEG] * 5, pa.large_binary()), "caption": ["b", "a", None, "b", "b"]}))
    assert seen == ["b", "a"]
    text = matrix(out["text_embedding"])[0]
    assert text[0].tobytes() == text[3].tobytes() != text[1].tobytes()


@pytest.mark.parametrize(
    ("towers", "appended"),
    [(("image",), ["image_embedding", "image_norm"]), (("text",), ["text_embedding"]), (("image", "text"), APPENDED)],
)
def test_only_the_towers_asked_for(spec, encode, towers, appended):
    table = many(3)
    out = ClipEncoder(spec, micro_batch=16, towers=towers)(table)
    assert out.column_names == [*table.column_names, *appended]
    assert out.select(appended).equals(encode(table).select(appended))
    assert ClipEncoder(spec, towers=towers)(DecodeImages(32)(table)).column_names[-len(appended) :] == appended


def test_memory_running_out_halves_the_micro_batch(encode):
    shapes = []

    def hungry(images):
        shapes.append(len(images))
        if len(images) > 4:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return images.flatten(1)[:, :64]

    operator = with_model(encode, hungry)
    roomy = with_model(encode, lambda images: images.flatten(1)[:, :64])
    out = operator(many(10))
    assert shapes == [16, 8, 4, 4, 4]
    assert operator.micro_batch == 4
    assert out.equals(roomy(many(10)))


def test_memory_running_out_for_a_single_sample_is_an_error(encode):
    def hopeless(images):
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        with_model(encode, hopeless)(many(2))


def test_values_beyond_float16_ask_for_float32(spec, encode):
    def loud(images):
        return images.flatten(1)[:, :64] * 0 + 7e4

    with pytest.raises(TarsiftError, match=r"7e\+04.*`store`"):
        with_model(encode, loud)(many(2))
    wide = with_model(ClipEncoder(spec, store="float32"), loud)(many(2))
    assert wide.schema.field("image_embedding").type == pa.list_(pa.float32(), 64)
    np.testing.assert_array_equal(matrix(wide["image_embedding"])[0], np.float32(7e4))
    assert np.isfinite(wide["image_norm"].to_numpy()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_an_error(encode, value):
    with pytest.raises(TarsiftError, match="not finite"):
        with_model(encode, lambda images: images.flatten(1)[:, :64] * value)(many(2))


def test_what_overflows_in_low_precision_is_encoded_in_fp32(spec):
    overflown = []

    def overflowing(images):
        out = images.flatten(1)[:, :64].clone()
        if torch.is_autocast_enabled("cpu"):
            bright = images[:, 0, 0, 0] > images[:, 0, 0, 1]
            out[bright] = torch.inf
            overflown.append(int(bright.sum()))
        return out

    table = many(9)
    low = with_model(ClipEncoder(spec, precision="fp16", micro_batch=4), overflowing)
    high = with_model(ClipEncoder(spec, precision="fp32", micro_batch=4), overflowing)
    assert low(table).select(["image_embedding"]).equals(high(table).select(["image_embedding"]))
    assert 0 < sum(overflown) < 9


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.06)])
def test_low_precision_is_near(spec, encode, precision, tolerance):
    table = many(12)
    low = ClipEncoder(spec, precision=precision, micro_batch=16)(table)
    for name in ("image_embedding", "text_embedding"):
        exact, near = (matrix(t[name])[0].astype(np.float64) for t in (encode(table), low))
        error = np.linalg.norm(exact - near, axis=1) / np.linalg.norm(exact, axis=1)
        assert 0 < error.max() < tolerance


def test_threads_are_explicit(spec):
    before = torch.get_num_threads()
    try:
        ClipEncoder(spec, threads=2)
        assert torch.get_num_threads() == 2
        ClipEncoder(spec)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_settings_override_and_travel(spec):
    operator = ClipEncoder(EncoderConfig(spec=spec, micro_batch=9), store="float32")
    assert operator.config == EncoderConfig(spec=spec, micro_batch=9, store="float32")
    assert pickle.loads(pickle.dumps(operator)).config == operator.config


@pytest.mark.parametrize("wrong", [{"micro_batch": 0}, {"precision": "int8"}, {"towers": ()}, {"batch": 3}])
def test_wrong_settings_are_named(spec, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ClipEncoder(spec, **wrong)
    with pytest.raises(ValidationError):
        EncoderConfig(spec=spec, **wrong)


@pytest.mark.parametrize(
    "device",
    ["gpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))],
)
def test_a_device_that_is_not_there_is_a_usage_error(spec, device):
    with pytest.raises(UsageError, match=device):
        ClipEncoder(spec, device=device)


def test_pixels_of_another_size_are_a_usage_error(encode):
    with pytest.raises(UsageError, match="DecodeImages\\(32\\)"):
        encode(DecodeImages(24)(many(1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_embeddings_of_a_gpu_are_near_those_of_a_cpu(spec, encode):
    table = many(40)
    on_gpu = ClipEncoder(spec, device="cuda")
    assert (on_gpu.precision, on_gpu.micro_batch) == ("fp16", 256)
    for name in ("image_embedding", "text_embedding"):
        exact, near = (matrix(operator(table)[name])[0].astype(np.float64) for operator in (encode, on_gpu))
        assert np.linalg.norm(exact - near, axis=1).max() < 0.01 * np.linalg.norm(exact, axis=1).min()
