"""What provides a module, and what is imported in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tarsift.pipelines import installed
from tarsift.pipelines.run import package_versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _looked_up_afresh():
    installed._distributions.cache_clear()
    yield
    installed._distributions.cache_clear()


def test_every_build_of_faiss_is_found_whatever_its_name(tmp_path, monkeypatch):
    [usual] = installed.providers("faiss")
    about = tmp_path / "faiss_gpu_cu12-1.9.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu-cu12\nVersion: 1.9.0\n")
    (about / "RECORD").write_text("faiss/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed._distributions.cache_clear()
    assert installed.providers("faiss").keys() == {usual, "faiss-gpu-cu12"}
    assert package_versions()["faiss-gpu-cu12"] == "1.9.0"
    assert installed.providers("nosuch") == {}


@pytest.mark.parametrize("way", ["the folder of the process", "PYTHONPATH"])
def test_what_is_imported_in_place_of_a_package_is_found(way, tmp_path, monkeypatch):
    empty, own = tmp_path / "empty", tmp_path / "own"
    empty.mkdir()
    (own / "torch").mkdir(parents=True)
    (own / "torch" / "__init__.py").touch()
    (own / "numpy.py").touch()
    (own / "ray").mkdir()  # no package: what is installed goes before it
    monkeypatch.chdir(empty)
    assert list(installed.shadows()) == []
    if way == "PYTHONPATH":
        monkeypatch.syspath_prepend(str(own))
    else:
        monkeypatch.chdir(own)
    assert dict(installed.shadows()) == {"numpy": own / "numpy.py", "torch": own / "torch" / "__init__.py"}


def test_a_checkout_that_is_installed_does_not_stand_in_its_own_way(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert list(installed.shadows(["tarsift"])) == []
