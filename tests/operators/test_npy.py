"""Arrays that are written block by block are those that numpy reads."""

from contextlib import ExitStack

import numpy as np
import pytest

from tarsift.operators.npy import NpyFile


@pytest.mark.parametrize("url", ["a/b.npy", "memory://npy/b.npy"])
def test_blocks_are_one_array(url, tmp_path):
    from tarsift.operators import storage

    url = url if "://" in url else str(tmp_path / url)
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(n, 3)).astype(np.float16) for n in (5, 0, 100_000)]
    with ExitStack() as stack:
        file = NpyFile(url, np.dtype(np.float16), (3,), stack)
        for block in blocks:
            file.add(block)
        with pytest.raises(ValueError, match="do not fit"):
            file.add(np.zeros((1, 4), np.float16))
        assert not storage.exists(url)
    copy = tmp_path / "copy.npy"
    copy.write_bytes(storage.read_bytes(url))
    found = np.load(copy)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.concatenate(blocks))


def test_no_rows_are_an_empty_array_and_nothing_is_left_of_a_failure(tmp_path):
    with ExitStack() as stack:
        NpyFile(str(tmp_path / "none.npy"), np.dtype("u8,u8"), (), stack)
    found = np.load(tmp_path / "none.npy")
    assert (found.dtype, found.shape) == (np.dtype("u8,u8"), (0,))

    def broken():
        with ExitStack() as stack:
            NpyFile(str(tmp_path / "broken.npy"), np.dtype("f4"), (), stack)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert [p.name for p in tmp_path.iterdir()] == ["none.npy"]
