"""The encoder as a stage: on CPUs its workers keep what they have loaded from one Dataset to the next, for a while."""

import os
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest

from tarsift.pipelines.config import ResourcesConfig
from tarsift.pipelines.encoding import Kept, encode_rows


class Numbered:
    """Makes what appends its number, the process it is in, and how often one was made there."""

    made = 0

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError("there is no such number")
        Numbered.made += 1
        self.number = number

    def __call__(self, table: pa.Table) -> pa.Table:
        told = {"number": self.number, "process": os.getpid(), "made": Numbered.made}
        return pa.table({name: [value] * len(table) for name, value in told.items()})


def test_what_is_asked_for_again_is_not_made_again():
    kept, before = Kept(60), Numbered.made
    table = pa.table({"x": [1, 2]})
    told = [kept.use(Numbered, {"number": number}, table) for number in (1, 1, 2, 1)]
    assert [t["number"][0].as_py() for t in told] == [1, 1, 2, 1]
    assert [t["made"][0].as_py() - before for t in told] == [1, 1, 2, 3]


def test_what_cannot_be_made_is_asked_for_again():
    kept = Kept(60)
    for _ in range(2):
        with pytest.raises(ValueError, match="there is no such number"):
            kept.use(Numbered, {"number": -1}, pa.table({"x": [1]}))
    assert kept.use(Numbered, {"number": 1}, pa.table({"x": [1]}))["number"][0].as_py() == 1


def test_what_is_not_used_is_let_go():
    kept, gone = Kept(0.05), threading.Event()

    class Large:
        def __call__(self, value: int) -> int:
            return value + 1

        def __del__(self) -> None:
            gone.set()

    assert kept.use(Large, {}, 1) == 2
    assert gone.wait(20)
    assert kept.use(Large, {}, 1) == 2


def test_what_is_used_is_not_let_go():
    kept, before = Kept(0.5), Numbered.made
    for _ in range(8):
        kept.use(Numbered, {"number": 5}, pa.table({"x": [1]}))
        time.sleep(0.1)
    assert Numbered.made == before + 1


@pytest.mark.parametrize("module", ["clean", "plan", "redo", "score_dataset"])
def test_drivers_leave_torch_to_the_workers(module):
    code = f"import sys, tarsift.pipelines.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_serve_one_dataset_after_the_other(ray_session):
    resources = ResourcesConfig(workers=1, batch_size=10)

    def told(number: int, kind: str) -> tuple[set[int], set[int], set[int]]:
        rows = ray_session.data.range(40, override_num_blocks=4)
        rows = encode_rows(rows, Numbered, {"number": number}, resources, shards=4, kind=kind)
        columns = rows.to_pandas()
        return tuple(set(columns[name]) for name in ("number", "process", "made"))  # pyright: ignore

    first, again, other = told(1, "a test's"), told(1, "a test's"), told(2, "a test's")
    assert again == first == ({1}, first[1], {1})
    assert other == ({2}, first[1], {2})
    of_another_kind = told(2, "another test's")
    assert of_another_kind[0] == {2}
    assert not of_another_kind[1] & first[1]
