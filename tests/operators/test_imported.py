"""Embeddings made elsewhere go to the samples they are of, whatever the order and number of their files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators import storage
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.operators.imported import ImportedEmbeddings, open_folder, write_index
from tarsift.operators.npy import read_header, read_rows
from tarsift.operators.regime import encoder_regime
from tarsift.operators.schema import matrix
from tarsift.operators.sides import choose_sides

D = 8


def put(
    folder, number: str, names: list[str | None], *, column: str = "image_path", seed: int = 0, kinds=("img", "text")
):
    """Write a partition as clip-retrieval does, and return its embeddings by kind."""
    rng = np.random.default_rng(seed)
    found = {}
    for kind in ("img", "text"):
        path = Path(folder) / f"{kind}_emb" / f"{kind}_emb_{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        found[kind] = rng.normal(size=(len(names), D)).astype(np.float16)
        np.save(path, found[kind])
    path = Path(folder) / "metadata" / f"metadata_{number}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(names, pa.string()), "caption": ["c"] * len(names)}), path)
    return found


def rows(keys: list[str], *, errors: dict[int, str] | None = None, captions: bool = True) -> pa.Table:
    errors = errors or {}
    images = [None if errors.get(i) in ("missing_image", "end_of_shard") else b"x" for i in range(len(keys))]
    return pa.table(
        {
            "key": keys,
            "uid": [f"u{key}" for key in keys],
            "image": pa.array(images, pa.large_binary()),
            "caption": pa.array(["c" if captions else None] * len(keys), pa.string()),
            "error": pa.array([errors.get(i) for i in range(len(keys))], pa.string()),
        }
    )


def joined(folder, table: pa.Table, *, to: str | None = None, towers=("image", "text"), store="float16") -> pa.Table:
    given = open_folder(str(folder))
    index = to or str(Path(folder).parent / "index")
    write_index(given, index)
    return ImportedEmbeddings(given, index, towers=towers, store=store)(table)


@pytest.mark.parametrize("column", ["image_path", "uid"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_every_sample_gets_its_own(column, where, tmp_path):
    names = [f"{i:05d}" for i in range(300)]
    order = np.random.default_rng(1).permutation(300)
    listed = [names[i] if column == "image_path" else f"u{names[i]}" for i in order]
    parts = [put(tmp_path / "e", f"{n:02d}", listed[n * 100 : n * 100 + 100], column=column, seed=n) for n in range(3)]
    to = None if where == "local" else f"memory://index/{tmp_path.name}"
    out = joined(tmp_path / "e", rows(names), to=to)
    assert out.column_names[-4:] == ["image_embedding", "image_norm", "text_embedding", "clip_similarity"]
    assert "image" not in out.column_names
    for kind, name in (("img", "image"), ("text", "text")):
        wanted = np.concatenate([part[kind] for part in parts])[np.argsort(order)]
        found, valid = matrix(out[f"{name}_embedding"])
        assert valid.all()
        np.testing.assert_array_equal(found, wanted)
    image, text = (np.asarray(matrix(out[f"{n}_embedding"])[0], np.float64) for n in ("image", "text"))
    cosine = (image * text).sum(axis=1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    np.testing.assert_allclose(out["clip_similarity"], cosine, atol=1e-6)
    np.testing.assert_allclose(out["image_norm"], np.linalg.norm(image, axis=1), rtol=1e-6)
    assert out["error"].null_count == 300


def test_a_sample_without_an_embedding_says_so_and_other_reasons_stay(tmp_path):
    given = put(tmp_path / "e", "0", ["a", "c", "d", "e"])
    errors = {2: "duplicate_key", 3: "missing_image", 4: "caption_too_large", 5: "end_of_shard"}
    out = joined(tmp_path / "e", rows(["a", "b", "c", "d", "e", "f"], errors=errors))
    assert out["error"].to_pylist() == [
        *(None, "no_embedding", "no_embedding", "missing_image", "caption_too_large", "end_of_shard")
    ]
    found, valid = matrix(out["image_embedding"])
    assert valid.tolist() == [True, False, False, False, True, False]
    np.testing.assert_array_equal(found[4], given["img"][3])
    assert joined(tmp_path / "e", rows([])).num_rows == 0


def test_no_caption_no_text_embedding_and_towers_are_those_asked_for(tmp_path):
    put(tmp_path / "e", "0", ["a"])
    out = joined(tmp_path / "e", rows(["a"], captions=False))
    assert out["image_embedding"].null_count == 0
    assert out["text_embedding"].null_count == out["clip_similarity"].null_count == 1
    out = joined(tmp_path / "e", rows(["a"]), towers=("image",), store="float32")
    assert out.column_names[-2:] == ["image_embedding", "image_norm"]
    assert out["image_embedding"].type.value_type == pa.float32()


def test_a_name_that_two_rows_have_is_refused(tmp_path):
    put(tmp_path / "e", "0", ["a", "b"])
    put(tmp_path / "e", "1", ["c", "b"])
    with pytest.raises(UsageError, match=r"two embeddings have the image_path 'b' \(row 1 of .*_0\.par.* and row"):
        joined(tmp_path / "e", rows(["a"]))
    assert not (tmp_path / "index" / "high.npy").exists()


def test_rows_without_a_name_are_nobodys(tmp_path):
    put(tmp_path / "e", "0", [None, "a", None])
    assert joined(tmp_path / "e", rows(["a", ""]))["error"].to_pylist() == [None, "no_embedding"]


def break_rows(folder):
    put(folder, "0", ["a"])
    np.save(folder / "img_emb" / "img_emb_0.npy", np.zeros((2, D), np.float16))


def break_pair(folder):
    put(folder, "0", ["a"])
    (folder / "text_emb" / "text_emb_0.npy").rename(folder / "text_emb" / "text_emb_1.npy")


def break_type(folder):
    put(folder, "0", ["a"])
    np.save(folder / "img_emb" / "img_emb_0.npy", np.array([{"a": 1}], object), allow_pickle=True)


def break_end(folder):
    put(folder, "0", ["a"] * 50)
    path = folder / "img_emb" / "img_emb_0.npy"
    path.write_bytes(path.read_bytes()[:-1])


def break_magic(folder):
    put(folder, "0", ["a"])
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(b"PK\3\4")


def break_metadata(folder):
    put(folder, "0", ["a"])
    (folder / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")


def break_width(folder):
    put(folder, "0", ["a"])
    np.save(folder / "text_emb" / "text_emb_0.npy", np.zeros((1, D + 1), np.float16))


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (lambda folder: folder.mkdir(), "holds no embeddings: looked for img_emb"),
        (break_rows, r"has 1 rows, and .*img_emb_0\.npy has 2"),
        (break_pair, r"no text_emb_0\.npy that goes with it"),
        (break_type, "no embeddings, a row each"),
        (break_end, "is cut: it says that it has 50 rows"),
        (break_magic, r"is no \.npy file"),
        (break_metadata, "is no Parquet file"),
        (break_width, "not all of one length"),
        (lambda folder: put(folder, "0", ["a"], column="url"), "neither `uid` nor `image_path`"),
    ],
)
def test_files_that_do_not_go_together_are_refused(break_, words, tmp_path):
    break_(tmp_path / "e")
    with pytest.raises(UsageError, match=words):
        open_folder(str(tmp_path / "e"))


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("column", ["uid", "image_path", "other"])
def test_a_type_that_ray_registers_runs_nothing(column, tmp_path):
    pytest.importorskip("ray.data._internal.object_extensions.arrow")
    put(tmp_path / "e", "0", ["a"])
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    about = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": bomb}
    fields = {name: pa.field(name, pa.string()) for name in ("image_path", "uid")}
    fields[column] = pa.field(column, pa.large_binary(), metadata=about)
    values = {"image_path": ["a"], "uid": ["ua"], column: [bomb]}
    table = pa.table({name: values[name] for name in fields}, schema=pa.schema(fields.values()))
    pq.write_table(table, tmp_path / "e" / "metadata" / "metadata_0.parquet")
    assert joined(tmp_path / "e", rows(["a"]))["error"].to_pylist() == [None]
    assert not (tmp_path / "ran").exists()


def test_names_that_are_longer_than_any_are_refused(tmp_path):
    put(tmp_path / "e", "0", ["a", "b" * 5000])
    with pytest.raises(UsageError, match="holds a text of 5,000 bytes, over 4,096"):
        joined(tmp_path / "e", rows(["a"]))


def test_embeddings_that_are_not_finite_end_the_run(tmp_path):
    put(tmp_path / "e", "0", ["a"])
    np.save(tmp_path / "e" / "img_emb" / "img_emb_0.npy", np.full((1, D), 1e6, np.float32))
    with pytest.raises(TarsiftError, match="not finite as float16"):
        joined(tmp_path / "e", rows(["a"]))
    assert joined(tmp_path / "e", rows(["a"]), store="float32")["error"].to_pylist() == [None]


def test_nothing_is_known_of_their_encoder_but_what_they_are(tmp_path):
    put(tmp_path / "e", "0", ["a"])
    info = encoder_info(f"embeddings:{tmp_path}/e")
    assert (info.name, info.embed_dim, info.trained_on) == ("embeddings:e", D, None)
    assert encoder_info(f"embeddings:{tmp_path}/e") == info
    regime = encoder_regime(info, {"0": "digest"})
    assert regime.code == "unknown"
    assert choose_sides({"detect": regime.code}).judges == ("density",)
    put(tmp_path / "e", "0", ["a"], seed=7)
    assert encoder_info(f"embeddings:{tmp_path}/e").weights_sha256 != info.weights_sha256


def test_rows_of_a_matrix_are_read_a_span_at_a_time(tmp_path):
    values = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    np.save(tmp_path / "m.npy", values)
    header = read_header(str(tmp_path / "m.npy"))
    wanted = np.array([4999, 0, 7, 7, 3000, 60, 3001])
    np.testing.assert_array_equal(read_rows(header, wanted), values[wanted])
    assert read_rows(header, wanted[:0]).shape == (0, 3)
    storage.put_bytes("memory://m.npy", (tmp_path / "m.npy").read_bytes())
    np.testing.assert_array_equal(read_rows(read_header("memory://m.npy"), wanted), values[wanted])
