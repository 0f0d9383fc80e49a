"""Models by name, encoder files, and what is refused."""

import json
import pickle

import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from tarsift.operators.checkpoints import CHECKPOINT_FORMAT
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.operators.models import (
    MODEL_CONFIGS,
    Base,
    build_model,
    load_checkpoint,
    load_encoder,
    model_config,
    save_checkpoint,
    weights_sha256,
)


@pytest.fixture(scope="module")
def tiny():
    return build_model("tiny", seed=3)


@pytest.fixture(scope="module")
def encoder_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "deep" / "enc.pt"
    shards = {"00000": "ab" * 32}
    save_checkpoint(
        path, tiny, config=model_config("tiny"), shards=shards, steps=7, samples=70, seed=3, extra={"loss": 1.5}
    )
    return path


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_shipped_configs_build_and_encode(name):
    config = model_config(name)
    model = build_model(name, seed=0)
    size = config["vision_cfg"]["image_size"]
    tokens = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])(["a dog", "ein Größenwahn"])
    with torch.no_grad():
        assert model.encode_image(torch.zeros(2, 3, size, size)).shape == (2, config["embed_dim"])
        assert model.encode_text(tokens).shape == (2, config["embed_dim"])


def test_seed_decides_every_weight_and_leaves_the_callers_random_state(tiny):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    again = build_model("tiny", seed=3)
    assert torch.rand(1) == expected
    other = build_model("tiny", seed=4)
    assert weights_sha256(again) == weights_sha256(tiny)
    same = {
        name
        for name, value in other.state_dict().items()
        if value.is_floating_point() and value.numel() > 1 and torch.equal(value, tiny.state_dict()[name])
    }
    # all that stays equal are gains, biases and running statistics, which start as ones and zeros
    assert all(tiny.state_dict()[name].unique().numel() == 1 for name in same)
    assert all(torch.isfinite(value.float()).all() for value in tiny.state_dict().values())


def test_digest_changes_with_every_part(tiny):
    model = build_model("tiny", seed=3)
    with torch.no_grad():
        model.positional_embedding[0, 0] += 1e-3
    assert weights_sha256(model) != weights_sha256(tiny)


def test_checkpoint_round_trip(tiny, encoder_file):
    checkpoint = load_checkpoint(encoder_file)
    assert checkpoint.shards == {"00000": "ab" * 32}
    assert (checkpoint.steps, checkpoint.samples, checkpoint.seed) == (7, 70, 3)
    assert checkpoint.extra == {"loss": 1.5}
    prepared = {
        "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "shortest"
    }  # fmt: skip
    assert checkpoint.config == {**model_config("tiny"), "preprocess_cfg": prepared}
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in checkpoint.state_dict.items())


def test_checkpoint_of_a_base_trained_further(tiny, tmp_path):
    known = {"00000": "bb" * 32, "00001": "cc" * 32, "base.pt:00000": "dd" * 32}
    for base, steps, unknown in (
        (Base("base.pt", "0" * 64, known, 30), 37, None),
        (Base("x", "", {}, None, "x"), None, "x"),
    ):
        save_checkpoint(
            tmp_path / "e.pt", tiny, config=model_config("tiny"), shards={"00000": "aa" * 32, "00001": "cc" * 32},
            steps=7, samples=70, seed=3, base=base,
        )  # fmt: skip
        checkpoint = load_checkpoint(tmp_path / "e.pt")
        assert checkpoint.base == base
        assert checkpoint.shards == {"00000": "aa" * 32, "00001": "cc" * 32}
        assert checkpoint.total_steps == steps
        encoder = load_encoder(str(tmp_path / "e.pt"))
        assert (encoder.steps, encoder.unknown_base) == (steps, unknown)
        # every digest is there, whatever names belong to several shards
        assert set((encoder.trained_on or {}).values()) == {"aa" * 32, "cc" * 32, *base.shards.values()}
    save_checkpoint(tmp_path / "e.pt", tiny, config=model_config("tiny"), shards={}, steps=7, samples=70, seed=3)
    assert load_checkpoint(tmp_path / "e.pt").base is None
    assert load_encoder(str(tmp_path / "e.pt")).steps == 7


def test_encoder_from_checkpoint(tiny, encoder_file):
    encoder = load_encoder(str(encoder_file))
    assert encoder.weights_sha256 == weights_sha256(tiny)
    assert encoder.trained_on == {"00000": "ab" * 32}
    assert encoder.steps == 7
    assert (encoder.image_size, encoder.embed_dim, encoder.context_length) == (32, 64, 32)
    assert (encoder.interpolation, encoder.resize_mode) == ("bicubic", "shortest")
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN
    assert encoder.std == open_clip.OPENAI_DATASET_STD
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert encoder.tokenizer(["a dog"]).shape == (1, 32)


def test_precision(encoder_file):
    assert load_encoder(str(encoder_file), precision="bf16").model.logit_scale.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="precision must be one of fp32, bf16, fp16, got 'int8'"):
        load_encoder(str(encoder_file), precision="int8")


def test_checkpoint_in_memory_storage(tiny):
    url = "memory://models/enc.pt"
    save_checkpoint(url, tiny, config=model_config("tiny"), shards={}, steps=1, samples=1, seed=0)
    assert load_encoder(url).weights_sha256 == weights_sha256(tiny)


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "distributed", "safetensors"])
def test_architecture_and_weights(tiny, tmp_path, wrapping):
    state = {k: v.contiguous() for k, v in tiny.state_dict().items()}
    path = tmp_path / "weights.pt"
    if wrapping == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif wrapping == "distributed":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state if wrapping == "bare" else {"state_dict": state}, path)
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"model_cfg": model_config("tiny"), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    for architecture in ("tiny", str(config)):
        encoder = load_encoder(f"{architecture}:{path}")
        assert encoder.weights_sha256 == weights_sha256(tiny)
        assert encoder.trained_on is None
        assert encoder.steps is None
    assert encoder.mean == (0.5, 0.5, 0.5)


def test_local_folder_in_the_form_of_the_hub(tiny, tmp_path):
    config = {"model_cfg": model_config("tiny"), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(tiny.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = load_encoder(f"local-dir:{tmp_path}")
    assert encoder.weights_sha256 == weights_sha256(tiny)
    assert encoder.mean == (0.1, 0.2, 0.3)
    assert encoder.embed_dim == 64


def test_random_weights_only_on_request():
    with pytest.raises(UsageError, match="names an architecture without weights"):
        load_encoder("tiny")
    encoder = load_encoder("tiny", allow_random=True)
    assert encoder.name == "tiny (random weights)"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("RN51", r"no model 'RN51'.*Did you mean RN50"),
        ("RN51:weights.pt", r"no model 'RN51'.*Did you mean RN50"),
        ("tinny", r"Did you mean tiny"),
        ("no/such/enc.pt", "there is no encoder file 'no/such/enc.pt'"),
        ("RN50:no/such.pt", r"neither a file of weights nor a tag of RN50 \(tags: openai"),
        ("RN50:yfcc16m", r"neither a file of weights nor a tag of RN50 \(tags: .*yfcc15m"),
        ("no/such.json:weights.pt", "neither a file of weights nor a tag"),
        ("local-dir:no/such/folder", "open_clip cannot load 'local-dir:no/such/folder'"),
    ],
)
def test_what_does_not_exist(spec, said):
    with pytest.raises(UsageError, match=said):
        load_encoder(spec)


def test_weights_of_another_architecture(tiny, tmp_path):
    state = dict(tiny.state_dict())
    state["text_projection"] = torch.zeros(3, 3)
    del state["logit_scale"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    said = (
        r"1 missing \(logit_scale\); 1 unknown \(extra.weight\); 1 of another shape \(text_projection \(3, 3\) in place"
    )
    with pytest.raises(UsageError, match=said):
        load_encoder(f"tiny:{tmp_path / 'w.pt'}")


class _Mark:
    """Runs code when it is unpickled: it makes the file it is given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_executed(tmp_path):
    mark = tmp_path / "executed"
    for name, save in (("torch.pt", torch.save), ("plain.pt", lambda x, p: p.write_bytes(pickle.dumps(x, 2)))):
        path = tmp_path / name
        save({"format": CHECKPOINT_FORMAT, "state_dict": _Mark(mark)}, path)
        for spec in (str(path), f"tiny:{path}"):
            with pytest.raises(TarsiftError, match="holds code besides tensors, which tarsift never runs"):
                load_encoder(spec)
    assert not mark.exists()


def test_files_that_are_no_encoder(encoder_file, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(TarsiftError, match=r"is not an encoder file of tarsift.*as in RN50:"):
        load_checkpoint(path)
    with pytest.raises(UsageError, match=r"1 unknown \(a\)"):
        load_encoder(f"tiny:{path}")
    torch.save([1, 2], path)
    with pytest.raises(TarsiftError, match="holds no state dict"):
        load_encoder(f"tiny:{path}")
    torch.save({"format": CHECKPOINT_FORMAT, "version": 99}, path)
    with pytest.raises(TarsiftError, match="has encoder format 99, this version of tarsift reads 1"):
        load_checkpoint(path)
    torch.save({"format": CHECKPOINT_FORMAT, "version": 1}, path)
    with pytest.raises(TarsiftError, match="without 'config': it is damaged"):
        load_checkpoint(path)
    data = encoder_file.read_bytes()
    for cut in (b"", data[:100], data[: len(data) // 2], data[:-50]):
        path.write_bytes(cut)
        with pytest.raises(TarsiftError, match="cannot be read as a file of tensors"):
            load_checkpoint(path)


def test_configs_that_are_none(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="is not a JSON file"):
        build_model(str(path), seed=0)
    path.write_text('{"embed_dim": 3}')
    with pytest.raises(UsageError, match="it lacks vision_cfg, text_cfg"):
        build_model(str(path), seed=0)
    with pytest.raises(UsageError, match="there is no model config"):
        build_model(str(tmp_path / "none.json"), seed=0)
    wrong = model_config("tiny")
    wrong["vision_cfg"]["no_such_setting"] = 1
    with pytest.raises(UsageError, match="does not describe a model that can be built"):
        build_model(wrong, seed=0)
