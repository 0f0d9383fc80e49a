"""The list of uids is what DataComp's resharder looks samples up in: sorted, each once, and none that is not kept."""

import numpy as np
import pytest

from tarsift.operators.errors import UsageError
from tarsift.operators.uids import SortedUids


def listed(folder, samples: list[tuple[str, bool]], *, run_rows: int = 1 << 20) -> tuple[np.ndarray, SortedUids]:
    uids = SortedUids(str(folder), run_rows=run_rows)
    for start in range(0, len(samples), 100):
        part = samples[start : start + 100]
        uids.add([uid for uid, _ in part], [kept for _, kept in part], "s")
    return np.concatenate([np.empty(0, "u8,u8"), *uids.blocks()]), uids


def plainly(samples: list[tuple[str, bool]]) -> np.ndarray:
    """All in memory, as the tools of DataComp make such a file."""
    others = {int(uid, 16) for uid, kept in samples if not kept}
    numbers = sorted({int(uid, 16) for uid, kept in samples if kept} - others)
    return np.array([divmod(number, 2**64) for number in numbers], "u8,u8")


@pytest.mark.parametrize("run_rows", [150, 1 << 20])
def test_any_number_of_runs_gives_the_same_list(run_rows, tmp_path):
    rng = np.random.default_rng(run_rows)
    names = [rng.bytes(16).hex() for _ in range(4000)]
    names += [f"{i:032x}" for i in (0, 1, 2**64 - 1, 2**64, 2**128 - 1)]
    samples = [(names[i], bool(rng.random() < 0.8)) for i in rng.integers(0, len(names), 6000)]
    found, uids = listed(tmp_path, samples, run_rows=run_rows)
    wanted = plainly(samples)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype
    kept = sum(keep for _, keep in samples)
    assert len(found) + uids.repeated + uids.shared == kept
    assert uids.shared > 0 < uids.repeated
    for uid, keep in samples[:50]:  # as the resharder does
        key = np.array([divmod(int(uid, 16), 2**64)], "u8,u8")[0]
        count = np.searchsorted(found, key, "right") - np.searchsorted(found, key, "left")
        assert count <= int(keep)


def test_one_uid_of_very_many_samples_takes_no_memory(tmp_path):
    samples = [("ab" * 16, True)] * 3000 + [("cd" * 16, True), ("cd" * 16, False)]
    found, uids = listed(tmp_path, samples, run_rows=200)
    assert len(found) == 1
    assert (uids.repeated, uids.shared) == (2999, 1)


def test_what_the_resharder_reads_otherwise_than_digits_counts_too(tmp_path):
    uid = f"{255:032x}"
    for other in ("ff", "0xFF", " f_f ", "+ff"):
        found, uids = listed(tmp_path, [(uid, True), (other, False), ("00000/7", False), ("1" * 99, False)])
        assert len(found) == 0
        assert uids.shared == 1


@pytest.mark.parametrize("uid", ["00000/000000001", "ff", "g" * 32, "٣" * 32, "a" * 33, ""])
def test_other_uids_are_refused(uid, tmp_path):
    with pytest.raises(UsageError, match="of a sample of 00000 has not 32 hexadecimal digits"):
        SortedUids(str(tmp_path)).add(["ab" * 16, uid], [True, True], "00000")


def test_none_is_none(tmp_path):
    assert len(listed(tmp_path, [])[0]) == 0
