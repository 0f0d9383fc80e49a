"""What is known of an encoder: its file's record says what loading it would, and torch reads the file as before."""

import subprocess
import sys
import zipfile

import pytest
import torch

from tarsift.operators import models
from tarsift.operators.checkpoints import state_sha256
from tarsift.operators.encoder_info import RECORD, encoder_info, info_of, short_name
from tarsift.operators.errors import TarsiftError
from tarsift.operators.models import Base, build_model, load_encoder, model_config, save_checkpoint


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("encoder") / "enc.pt")
    shards = {"a": "11", "b": "22"}
    save_checkpoint(
        path, build_model("tiny", seed=5), config=model_config("tiny"), shards=shards, steps=40, samples=9, seed=5
    )
    return path


@pytest.mark.parametrize(
    ("change", "built"),
    [
        ({}, False),
        ({"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize_mode": "squash"}}, False),
        ({"text_cfg": {"vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}}, True),  # 77 tokens, as they say not
    ],
)
def test_what_an_encoder_file_says_of_itself(tmp_path, monkeypatch, change, built):
    config = model_config({**model_config("tiny"), **change})
    url, base = str(tmp_path / "enc.pt"), Base("base.pt", "0" * 64, {"a": "11"}, None, "base.pt")
    model = build_model(config, seed=5).half()
    save_checkpoint(url, model, config=config, shards={"b": "22"}, steps=40, samples=9, seed=5, base=base)
    loaded = models.load_encoder(url)
    calls = []
    monkeypatch.setattr(models, "load_encoder", lambda spec: calls.append(spec) or loaded)
    info = encoder_info(url)
    assert calls == [url] * built
    assert info == info_of(loaded)
    assert info.weights_sha256 == models.weights_sha256(model)
    assert info.trained_on == {"a": "11", "b": "22"}


def test_torch_is_not_loaded_to_read_a_record(spec):
    code = f"""
import sys
from tarsift.operators.encoder_info import encoder_info
encoder_info({spec!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_encoder_info_describes(spec):
    info, encoder = encoder_info(spec), load_encoder(spec)
    assert (info.image_size, info.embed_dim, info.context_length) == (32, 64, 32)
    assert (info.interpolation, info.resize_mode) == (encoder.interpolation, encoder.resize_mode)
    assert (info.name, info.weights_sha256) == ("enc.pt", encoder.weights_sha256)
    assert (info.trained_on, info.steps) == ({"a": "11", "b": "22"}, 40)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_passes_the_record_over(spec, mmap):
    content = torch.load(spec, weights_only=True, mmap=mmap)
    assert state_sha256(content["state_dict"]) == encoder_info(spec).weights_sha256


def test_a_store_is_asked_for_the_record_too(spec):
    url = "memory://test_encoder_info/enc.pt"
    save_checkpoint(
        url, build_model("tiny", seed=5), config=model_config("tiny"), shards={"a": "11", "b": "22"}, steps=40,
        samples=9, seed=5,
    )  # fmt: skip
    assert encoder_info(url) == encoder_info(spec)


def other_record(spec: str, path, change: bytes | None) -> str:
    """Copy an encoder file with another record, or with none."""
    with zipfile.ZipFile(spec) as archive, zipfile.ZipFile(path, "w") as copy:
        for member in archive.infolist():
            if not member.filename.endswith(RECORD):
                copy.writestr(member, archive.read(member))
            elif change is not None:
                copy.writestr(member, change)
    return str(path)


@pytest.mark.parametrize("change", [None, b"", b"[]", b"{}", b'{"version": 2}', b'{"version": 1, "embed_dim": 64}'])
def test_a_file_whose_record_says_nothing_is_loaded(spec, tmp_path, monkeypatch, change):
    url = other_record(spec, tmp_path / "enc.pt", change)
    calls = []
    monkeypatch.setattr(models, "load_encoder", lambda spec: calls.append(spec) or load_encoder(spec))
    assert encoder_info(url) == encoder_info(spec)
    assert calls == [url]


def test_what_torch_writes_anew_has_no_record_that_is_out_of_date(spec, tmp_path):
    content = torch.load(spec, weights_only=True)
    next(iter(content["state_dict"].values())).zero_()
    torch.save(content, tmp_path / "enc.pt")
    assert encoder_info(str(tmp_path / "enc.pt")).weights_sha256 == state_sha256(content["state_dict"])


def test_an_archive_of_nothing_is_no_encoder_file(tmp_path):
    zipfile.ZipFile(tmp_path / "enc.pt", "w").close()
    with pytest.raises(TarsiftError, match="damaged"):
        encoder_info(str(tmp_path / "enc.pt"))


def test_a_file_that_ends_too_early_is_damaged(spec, tmp_path):
    url = tmp_path / "enc.pt"
    with open(spec, "rb") as whole:
        url.write_bytes(whole.read()[:-100])
    with pytest.raises(TarsiftError, match="damaged"):
        encoder_info(str(url))


@pytest.mark.parametrize(
    ("spec", "short"),
    [
        ("/models/enc.pt", "enc.pt"),
        ("s3://bucket/models/enc.pt", "enc.pt"),
        ("http://store:9000/models/enc.pt", "enc.pt"),
        ("http://store:9000/a.json:http://store:9000/w.pt", "http://store:9000/a.json:w.pt"),
        ("RN50:/models/cc3m.pt", "RN50:cc3m.pt"),
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32:laion2b_s34b_b79k"),
        ("hf-hub:org/name", "hf-hub:org/name"),
    ],
)
def test_names_of_encoders_leave_out_folders(spec, short):
    assert short_name(spec) == short
