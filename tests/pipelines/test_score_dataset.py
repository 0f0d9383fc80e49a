"""A Dataset of one's own images and captions gets the scores that `clean` gives them, row by row."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tarsift
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.reading import read_shards

SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=128", "reference.key=night"]
LABELS = ("shard", "row", "key", "uid", "image_sha256", "error")
KEYED = load_config(settings=SMALL)
KEYLESS = load_config(settings=SMALL[:2])


def table_of(ray, ds) -> pa.Table:
    return pa.concat_tables(ray.get(ds.to_arrow_refs()))


@pytest.fixture(scope="module")
def rows(ray_session, dump):
    """The rows of the dump, in the order of its shards."""
    columns = ["shard", "row", "key", "image", "caption"]
    table = table_of(ray_session, read_shards(str(dump)).select_columns(columns))
    return table.sort_by([("shard", "ascending"), ("row", "ascending")])


@pytest.fixture(scope="module")
def both(ray_session, dump, encoder, witness, tmp_path_factory):
    """The score files of `clean` with two encoders, as one table."""
    out = str(tmp_path_factory.mktemp("both"))
    specs = [f"encoders.detect.spec={encoder}", f"encoders.witness.spec={witness}"]
    clean(str(dump), out, config=load_config(settings=[*SMALL, *specs]))
    folder = storage.join(out, "scores")
    names = sorted(storage.list_files(folder, ".parquet"))
    return pa.concat_tables(pq.read_table(storage.join(folder, name)) for name in names)


@pytest.fixture(scope="module")
def scored(ray_session, rows, encoder, witness):
    """The same by `score_dataset`, with the embeddings, from blocks that are not those of the shards."""
    ds = ray_session.data.from_arrow([rows.slice(start, 57) for start in range(0, len(rows), 57)])
    more = {"encoder": encoder, "witness": witness, "config": KEYED, "embeddings": True}
    return table_of(ray_session, tarsift.score_dataset(ds, **more))


def assert_same(found: pa.Table, expected: pa.Table, names) -> None:
    """Bits are the same: an encoder runs at one padded shape, and no score depends on what else is in a batch."""
    assert names
    for name in names:
        assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name


def test_scores_are_those_of_clean(rows, both, scored):
    assert scored.column_names[: len(rows.column_names)] == rows.column_names
    assert_same(scored, rows, rows.column_names)
    made = [name for name in both.column_names if name not in LABELS]
    assert {"suspicion", "suspicion_density", "caption_mismatch", "dao_k8", "duplicate_count"} <= {*made}
    assert_same(scored, both, [*made, "error"])
    embedded = [f"{who}{tower}_embedding" for who in ("", "witness_") for tower in ("image", "text")]
    assert {*scored.column_names} == {*rows.column_names, *made, *embedded, "error"}


def test_a_bad_image_is_a_row_with_null_scores_and_a_reason(scored):
    bad = [(at, error) for at, error in enumerate(scored["error"].to_pylist()) if error]
    assert bad == [(3, "undecodable_image"), (5, "missing_caption")]
    nulls = [at for at, value in enumerate(scored["suspicion"].to_pylist()) if value is None]
    assert nulls == [3]
    assert scored["caption_mismatch"].to_pylist()[5] is None


def test_pixels_in_any_form_and_any_order_get_one_score(ray_session, rows, encoder):
    """PIL images and arrays of the same pixels, the rows shuffled, with a key that comes from the images."""
    images = [row for row in rows.to_pylist() if row["row"] not in (3, 5, 7)][:200]
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in images]
    plain = [{"text": row["caption"], "photo": array, "n": n} for n, (row, array) in enumerate(zip(images, pixels))]  # noqa: B905
    order = np.random.default_rng(0).permutation(len(plain)).tolist()
    pil = [{**plain[n], "photo": Image.fromarray(plain[n]["photo"])} for n in order]
    found = []
    for items, blocks in ((plain, 3), (pil, 2)):
        ds = ray_session.data.from_items(items, override_num_blocks=blocks)
        names = {"image": "photo", "caption": "text", "leave_out": ["photo"]}
        found.append(table_of(ray_session, tarsift.score_dataset(ds, encoder=encoder, config=KEYLESS, **names)))
    assert found[0]["n"].to_pylist() == [*range(len(plain))]
    assert found[1]["n"].to_pylist() == order
    assert "photo" not in found[0].column_names
    assert not [name for name in found[0].column_names if name.endswith("_embedding")]
    assert found[0]["suspicion"].null_count == 0
    assert_same(found[1].sort_by("n"), found[0], found[0].column_names)


def test_without_captions_only_images_are_judged(ray_session, rows, encoder):
    ds = ray_session.data.from_arrow(rows.select(["image", "key"]))
    events = []
    scored = tarsift.score_dataset(ds, encoder=encoder, caption=None, config=KEYLESS, progress=events.append)
    found = table_of(ray_session, scored)
    assert found.column_names[:2] == ["image", "key"]
    assert not {"caption_excess", "clip_similarity"} & {*found.column_names}
    assert [at for at, error in enumerate(found["error"].to_pylist()) if error] == [3]
    assert found["suspicion"].null_count == 1
    finished = [(event.name, event.done, event.total) for event in events if event.finished]
    assert [name for name, *_ in finished] == ["embed", "reference", "density", "enriched", "score"]
    assert all(done == total for _, done, total in finished)
    assert max(event.samples for event in events) == len(rows)


def test_settings_of_the_users_dataset_are_put_back(ray_session, rows, witness):
    ds = ray_session.data.from_arrow(rows)
    before = (ds.context.execution_options, ds.context.enable_progress_bars)
    with pytest.raises(UsageError, match="the Dataset is empty"):
        tarsift.score_dataset(ds.filter(lambda row: False), witness=witness, config=KEYLESS)
    assert (ds.context.execution_options, ds.context.enable_progress_bars) == before
    assert not before[0].preserve_order


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image": "picture"}, "no column 'picture'; the Dataset has: shard, row, key, image, caption"),
        ({"leave_out": ["nothing"]}, "no column 'nothing'"),
        ({"caption": None}, "a witness judges how well captions fit: name the column of captions"),
        ({"witness": None}, "no encoder: give encoder=MODEL"),
        ({"witness": "embeddings:folder"}, "embeddings made elsewhere are joined to shards"),
        ({"image": "key"}, r"images are given as bytes, PIL images, or .*; found str: read the files first"),
        ({"caption": "row"}, "'row' holds int, and captions are text"),
    ],
)
def test_what_cannot_be_scored_is_refused(ray_session, rows, witness, change, why):
    given = {"witness": witness, "config": KEYLESS, **change}
    with pytest.raises(UsageError, match=why):
        tarsift.score_dataset(ray_session.data.from_arrow(rows), **given)


def test_columns_that_the_result_gets_are_refused_before_any_work(ray_session, scored, witness):
    with pytest.raises(UsageError, match=r"names .*suspicion.*, which the Dataset has: rename them, drop them"):
        tarsift.score_dataset(ray_session.data.from_arrow(scored), witness=witness)
    ds = ray_session.data.from_items([{"image": b"", "caption": "", "error": 3}])
    with pytest.raises(UsageError, match="names error, which"):
        tarsift.score_dataset(ds, witness=witness)


def test_too_few_rows_are_told_as_such(ray_session, rows, witness):
    with pytest.raises(UsageError, match="too few images with a caption"):
        tarsift.score_dataset(ray_session.data.from_arrow(rows.slice(10, 20)), witness=witness)
