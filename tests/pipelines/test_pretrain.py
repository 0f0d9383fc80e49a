"""Training on shards: what is read, what is learned, what is recorded, and that it repeats."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from itertools import islice

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.errors import Interrupted, UsageError
from tarsift.operators.models import (
    Base,
    build_model,
    build_tokenizer,
    load_checkpoint,
    load_encoder,
    model_config,
    weights_sha256,
)
from tarsift.operators.regime import encoder_regime
from tarsift.operators.shards import ReadConfig, list_shards
from tarsift.pipelines import cli
from tarsift.pipelines.pairs import PairReader, PairStream, cached_batches, load_pairs, streamed_batches
from tarsift.pipelines.pretrain import pretrain_here
from tarsift.pipelines.shard_digests import digest_shard
from tarsift.pipelines.train_settings import PretrainConfig, TrainConfig
from tarsift.pipelines.training import encode_trimmed, learning_rate, train_clip
from tests.operators.hostile_decoder import EAT, HANG, KILL, LATER, hostile

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
READER = PairReader(32, "bicubic", "shortest", ReadConfig(), ImageConfig())
TOKENIZER = build_tokenizer(model_config("tiny"))


def picture(colour, seed=0, size=(32, 32)):
    noise = np.random.default_rng(seed).normal(0, 12, (*size, 3))
    return (np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of 20 samples in four colours, one of them compressed."""
    folder = tmp_path_factory.mktemp("shards")
    names = list(COLOURS)
    for s, name in enumerate(("00000.tar", "00001.tar", "00002.tar.gz")):
        members = []
        for i in range(20 * s, 20 * s + 20):
            colour = names[i % 4]
            caption = f"a {colour} square number {i}"
            members += [(f"{i:05d}.png", encoded(picture(colour, i))), (f"{i:05d}.txt", caption.encode())]
            members.append((f"{i:05d}.json", json.dumps({"caption": f"json {caption}"}).encode()))
        write_tar(folder / name, members)
    return folder


def test_reader_gives_pairs_in_order(folder):
    skipped = Counter()
    pairs = list(READER(list_shards(str(folder)), skipped))
    assert [pair.caption for pair in pairs] == [f"a {list(COLOURS)[i % 4]} square number {i}" for i in range(60)]
    np.testing.assert_array_equal(pairs[5].pixels, picture("green", 5))
    assert not skipped


def test_reader_takes_captions_from_json(folder):
    reader = PairReader(32, "bicubic", "shortest", ReadConfig(captions="json:caption"), ImageConfig())
    assert next(iter(reader(list_shards(str(folder)), Counter()))).caption == "json a red square number 0"


def test_reader_skips_and_counts_what_is_bad(tmp_path):
    good = encoded(picture("red"))
    write_tar(
        tmp_path / "x.tar",
        [
            ("0.png", good), ("0.txt", b"kept"),
            ("1.png", b"no image"), ("1.txt", b"broken"),
            ("2.png", good),
            ("3.txt", b"alone"),
            ("4.png", good), ("4.txt", b"  "),
            ("5.a.png", good), ("5.a.txt", b"dotted key"),
            ("README", b"stray"),
        ],
    )  # fmt: skip
    skipped = Counter()
    found = [pair.caption for pair in READER(list_shards(str(tmp_path)), skipped)]
    assert found == ["kept", "dotted key"]
    assert skipped == {"undecodable_image": 1, "missing_caption": 2, "missing_image": 1}


def test_reader_keeps_the_bounds_of_the_main_job(tmp_path):
    """What is too large is skipped by its reason, without being held, also in a shard of a few kilobytes."""
    good, huge = encoded(picture("red")), bytes(24 << 20)
    members = [("0.png", good), ("0.txt", b"kept"), ("1.png", huge), ("1.txt", b"large picture")]
    members += [("2.png", good), ("2.txt", b"large caption " + huge), ("3.png", good), ("3.txt", b"kept too")]
    members += [("4.json", b'{"caption": "' + huge.replace(b"\0", b"x")), ("4.png", good), ("4.txt", b"and this")]
    write_tar(tmp_path / "x.tar.gz", members)
    del huge, members
    reader = PairReader(32, "bicubic", "shortest", ReadConfig(max_image_bytes=1 << 20), ImageConfig())
    skipped = Counter()
    tracemalloc.start()
    found = [pair.caption for pair in reader(list_shards(str(tmp_path)), skipped)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["kept", "kept too", "and this"]
    assert skipped == {"image_too_large": 1, "caption_too_large": 1}
    assert peak < 8 << 20, f"{peak >> 20} MB"


def test_reader_sees_the_samples_that_the_main_job_sees(tmp_path):
    """Joined where their members are apart, refused where they claim another one's key, pairs up to any damage."""
    image = [encoded(picture("red", seed)) for seed in range(4)]
    apart = [("0.png", image[0]), ("1.png", image[1]), ("0.txt", b"zero"), ("1.txt", b"one")]
    again = [("0.png", image[2]), ("0.txt", b"not zero"), ("2.png", image[3]), ("2.txt", b"two \xff")]
    write_tar(tmp_path / "x.tar", [*apart, *again])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    (tmp_path / "y.tar").write_bytes(data[: data.find(b"2.txt") + 200])
    skipped = Counter()
    shards = list_shards(str(tmp_path))
    pairs = list(READER(shards, skipped))
    assert [digest_shard(shard, ReadConfig()).pairs for shard in shards] == [3, 2]
    assert [(pair.shard, pair.key, pair.caption) for pair in pairs] == [
        ("x", "0", "zero"), ("x", "1", "one"), ("x", "2", "two \N{REPLACEMENT CHARACTER}"),
        ("y", "0", "zero"), ("y", "1", "one"),
    ]  # fmt: skip
    assert skipped == {"duplicate_key": 2, "truncated_member": 1}
    assert load_pairs(READER, shards, TOKENIZER, most=5).skipped == skipped


def test_cached_batches_are_permutations_shared_among_ranks(folder):
    cache = load_pairs(READER, list_shards(str(folder)), TOKENIZER, most=60)
    assert cache.pixels.shape == (60, 32, 32, 3)
    alone = list(islice(cached_batches(cache, batch_size=20, seed=1), 6))
    ranks = [list(islice(cached_batches(cache, batch_size=10, seed=1, rank=r, world=2), 6)) for r in (0, 1)]
    for i in range(6):
        joint = torch.cat([ranks[0][i].pixels, ranks[1][i].pixels])
        assert torch.equal(alone[i].pixels, joint)
        assert torch.equal(alone[i].tokens, torch.cat([ranks[0][i].tokens, ranks[1][i].tokens]))
    for start in (1, 3, 4):
        later = next(cached_batches(cache, batch_size=20, seed=1, start=start))
        assert torch.equal(later.pixels, alone[start].pixels)
        assert later.epoch == alone[start].epoch == start // 3
    names = cache.names.take(alone[4].rows.numpy())
    assert [f"{i:05d}" for i in alone[4].rows.tolist()] == names["key"].to_pylist()
    assert [f"0000{i // 20}" for i in alone[4].rows.tolist()] == names["shard"].to_pylist()
    for epoch in (alone[:3], alone[3:]):
        seen = {row.numpy().tobytes() for batch in epoch for row in batch.pixels}
        assert len(seen) == 60
    assert not torch.equal(alone[0].pixels, alone[3].pixels)
    with pytest.raises(ValueError, match="a batch of 61 pairs needs as many, got 60"):
        next(cached_batches(cache, batch_size=61, seed=1))


def test_streamed_batches_repeat_with_the_seed_and_cover_the_shards(folder):
    shards = list_shards(str(folder))
    stream = PairStream(READER, shards, TOKENIZER, batch_size=15, seed=4, shuffle=30)
    one, two = (list(islice(streamed_batches(stream), 8)) for _ in range(2))
    assert all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True)
    )
    counts = Counter(row.numpy().tobytes() for batch in one for row in batch.pixels)
    assert len(counts) == 60
    assert max(counts.values()) <= 4
    with pytest.raises(ValueError, match="4 readers need as many shards, got 3"):
        next(streamed_batches(PairStream(READER, shards, TOKENIZER, 4, 0, 10, rank=0, world=4)))


def test_a_stream_begins_at_about_the_place_it_had_come_to(folder):
    shards = list_shards(str(folder))
    captions = []

    def tokenizer(texts):
        captions.extend(texts)
        return TOKENIZER(texts)

    order = np.random.default_rng([4, 2]).permutation(3)  # of the shards in the third epoch
    stream = PairStream(READER, shards, tokenizer, batch_size=20, seed=4, shuffle=1, start=2.4)
    list(islice(streamed_batches(stream), 2))
    read = [int(caption.split()[-1]) // 20 for caption in captions]
    assert read == [order[1]] * 20 + [order[2]] * 20


def test_streams_of_two_ranks_do_not_overlap_within_an_epoch(folder):
    shards = list_shards(str(folder))[:2]
    rows = []
    for rank in (0, 1):
        stream = PairStream(READER, shards, TOKENIZER, batch_size=10, seed=4, shuffle=1, rank=rank, world=2)
        rows.append({r.numpy().tobytes() for b in islice(streamed_batches(stream), 2) for r in b.pixels})
    assert [len(r) for r in rows] == [20, 20]
    assert not rows[0] & rows[1]


def test_trimmed_captions_embed_as_whole_ones():
    model = build_model("tiny", seed=0).eval()
    tokens = TOKENIZER(["a dog", "a very long caption " * 20, "one two three four five"])
    with torch.no_grad():
        for rows in (tokens, tokens[[0, 2]], tokens[:1]):
            torch.testing.assert_close(
                encode_trimmed(model, rows, torch.device("cpu")), model.encode_text(rows), atol=1e-6, rtol=1e-5
            )


def test_learning_rate_rises_and_falls():
    config = TrainConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 200, config) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert np.argmax(rates) == 9
    assert rates[100] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert np.argmax([learning_rate(step, 20, config) for step in range(20)]) == 1  # a tenth at most


def test_training_learns_and_repeats(folder):
    cache = load_pairs(READER, list_shards(str(folder)), TOKENIZER, most=60)

    def train():
        model = build_model("tiny", seed=0)
        log = train_clip(
            model, cached_batches(cache, batch_size=30, seed=0), steps=8, config=TrainConfig(warmup_steps=2)
        )
        return model, log

    (one, log), (two, again) = train(), train()
    assert log.losses == again.losses
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert log.losses[-1] < 0.8 * log.losses[0]
    assert not one.training


@pytest.mark.parametrize("cache_bytes", [2 << 30, 0])
def test_pretrain_records_what_it_saw(folder, tmp_path, cache_bytes):
    out = str(tmp_path / "enc.pt")
    config = PretrainConfig(steps=60, batch_size=30, seed=5, shuffle=20, cache_bytes=cache_bytes)
    steps = []
    threads = torch.get_num_threads()
    summary = pretrain_here(str(folder), out=out, config=config, on_step=lambda step, loss: steps.append(step))
    assert torch.get_num_threads() == threads
    assert steps == list(range(1, 61))
    assert (summary.steps, summary.samples, summary.pairs, summary.skipped) == (60, 1800, 60, {})
    checkpoint = load_checkpoint(out)
    assert checkpoint.shards == {
        f.name.split(".")[0]: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()
    }
    assert checkpoint.extra["settings"]["batch_size"] == 30
    encoder = load_encoder(out)
    assert encoder.trained_on == checkpoint.shards
    # chance is log(30) = 3.4; knowing the colours, log(7.5) = 2.0, for numbers cannot be seen
    assert summary.loss < 2.6


@pytest.mark.parametrize(
    ("module", "loaded"),
    [("pretrain", ["torch"]), ("ingest", ["torch"]), ("train_workers", []), ("shard_digests", [])],
)
def test_drivers_load_no_open_clip_and_tasks_no_torch(module, loaded):
    """Each would take seconds more before it begins."""
    code = f"import sys, tarsift.pipelines.{module}; print([m for m in ('torch', 'open_clip') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(loaded)


def test_epochs_count_whole_batches(folder, tmp_path):
    config = PretrainConfig(epochs=2, batch_size=25)
    assert pretrain_here(str(folder), out=str(tmp_path / "e.pt"), config=config).steps == 4


def test_batch_larger_than_the_dump(folder, tmp_path):
    shard = str(folder / "00000.tar")
    assert pretrain_here(shard, out=str(tmp_path / "e.pt"), config=PretrainConfig(steps=1)).samples == 20


def test_damage_is_counted_and_too_little_refused(folder, tmp_path):
    data = (folder / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2 + 300])
    summary = pretrain_here(str(tmp_path), out=str(tmp_path / "e.pt"), config=PretrainConfig(steps=1, batch_size=4))
    assert summary.skipped == {"truncated": 1}
    assert 5 < summary.pairs < 15
    write_tar(tmp_path / "cut.tar", [("0.txt", b"alone")])
    with pytest.raises(UsageError, match="nothing to train on: 1 shards with 0 usable pairs"):
        pretrain_here(str(tmp_path), out=str(tmp_path / "e.pt"), config=PretrainConfig(steps=1))


def hostile_shards(folder, words):
    """Write two shards of 16 samples; return a pattern for them, and one for the same without those with words."""
    for kind in ("in", "without"):
        (folder / kind).mkdir()
        for s in range(2):
            members = []
            for i in range(16 * s, 16 * s + 16):
                if kind == "in" or i not in words:
                    image = encoded(picture(list(COLOURS)[i % 4], i)) + words.get(i, b"")
                    members += [(f"{i:05d}.png", image), (f"{i:05d}.txt", f"square {i}".encode())]
            write_tar(folder / kind / f"{s:05d}.tar", members)
    return str(folder / "in"), str(folder / "without")


@pytest.mark.parametrize(
    ("words", "timeout_s", "skipped"),
    [
        ({0: KILL, 20: EAT, 31: KILL}, 30, {"decoder_died": 2, "undecodable_image": 1}),
        ({7: HANG}, 3, {"decoder_died": 1}),
    ],
)
def test_images_that_kill_their_decoder_are_skipped_alone(tmp_path, monkeypatch, words, timeout_s, skipped):
    dump, without = hostile_shards(tmp_path, words)
    config = PretrainConfig(steps=4, batch_size=14, images=ImageConfig(timeout_s=timeout_s))
    plain = pretrain_here(without, out=str(tmp_path / "a.pt"), config=config)
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path / "site"))
    summary = pretrain_here(dump, out=str(tmp_path / "b.pt"), config=config)
    assert summary.skipped == skipped
    assert load_checkpoint(tmp_path / "b.pt").extra["skipped"] == summary.skipped
    assert (summary.pairs, summary.weights_sha256) == (plain.pairs, plain.weights_sha256)


@pytest.mark.parametrize("decoders", [0, 2])
def test_streams_go_on_without_images_that_kill_their_decoder(tmp_path, monkeypatch, decoders):
    dump, _ = hostile_shards(tmp_path, {3: KILL, 17: KILL})
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path / "site"))
    config = PretrainConfig(steps=3, batch_size=10, cache_bytes=0, shuffle=1, decoders=decoders)
    summary = pretrain_here(dump, out=str(tmp_path / "e.pt"), config=config)
    assert summary.steps == 3
    assert summary.skipped["decoder_died"] >= 2
    assert summary.skipped.keys() == {"decoder_died"}


def test_pairs_that_are_not_those_of_the_snapshot(tmp_path, monkeypatch):
    """A training does not go on with other pairs because some decoder died only once."""
    dump, _ = hostile_shards(tmp_path, {5: LATER})
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path / "site"))
    config = PretrainConfig(steps=3, batch_size=10, snapshot_s=0)

    def crash(step, loss):
        if step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain_here(dump, out=str(tmp_path / "e.pt"), config=config, on_step=crash)
    with pytest.raises(Interrupted, match="decoded in one reading of the pairs and not in another one"):
        pretrain_here(dump, out=str(tmp_path / "e.pt"), config=config)
    summary = pretrain_here(dump, out=str(tmp_path / "e.pt"), config=config, force=True)
    assert (summary.pairs, summary.skipped) == (31, {"decoder_died": 1})


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory) -> str:
    """An encoder that was trained on the first shard for three steps."""
    out = str(tmp_path_factory.mktemp("base") / "base.pt")
    pretrain_here(str(folder / "00000.tar"), out=out, config=PretrainConfig(steps=3, batch_size=10, seed=8))
    return out


def test_a_base_is_trained_further(folder, base, tmp_path):
    """Its weights are the first ones, and what it was trained on is kept apart from what is seen now."""
    rest = [str(folder / "00001.tar"), str(folder / "00002.tar.gz")]
    out, losses = str(tmp_path / "further.pt"), []
    config = PretrainConfig(base=base, steps=2, batch_size=20, seed=5)
    summary = pretrain_here(rest, out=out, config=config, on_step=lambda step, loss: losses.append(loss))
    before = load_checkpoint(base)
    model = build_model("tiny", seed=None)
    model.load_state_dict(before.state_dict)
    cache = load_pairs(READER, list_shards(rest), TOKENIZER, most=40)
    batches = cached_batches(cache, batch_size=20, seed=5)
    by_hand = train_clip(model, batches, steps=2, config=TrainConfig(lr=4e-4))
    assert losses == by_hand.losses
    assert summary.weights_sha256 == weights_sha256(model)

    digests = {f.name.split(".")[0]: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    checkpoint = load_checkpoint(out)
    assert checkpoint.base == Base("base.pt", load_encoder(base).weights_sha256, {"00000": digests["00000"]}, 3)
    assert checkpoint.shards == {name: digests[name] for name in ("00001", "00002")}
    assert (checkpoint.steps, checkpoint.total_steps, checkpoint.samples) == (2, 5, 40)
    assert checkpoint.extra["settings"]["train"]["lr"] == 4e-4
    info = encoder_info(out)
    assert (info.trained_on, info.steps) == (digests, 5)
    assert encoder_regime(info, digests).code == "trained_on_this_dump"
    # and once more, from what was made here
    again = str(tmp_path / "again.pt")
    pretrain_here(rest[0], out=again, config=PretrainConfig(base=out, steps=1, batch_size=20))
    assert load_checkpoint(again).total_steps == 6
    assert load_encoder(again).trained_on == digests


def test_a_base_that_does_not_say_what_it_was_trained_on(folder, base, tmp_path):
    weights, out = str(tmp_path / "weights.pt"), str(tmp_path / "e.pt")
    torch.save(load_checkpoint(base).state_dict, weights)
    shard = str(folder / "00000.tar")
    pretrain_here(shard, out=out, config=PretrainConfig(base=f"tiny:{weights}", model="tiny", steps=1, batch_size=20))
    info = encoder_info(out)
    assert (info.unknown_base, info.steps) == ("tiny:weights.pt", None)
    assert encoder_regime(info, info.trained_on).code == "trained_on_this_dump"
    assert encoder_regime(info, {"x": "11"}).code == "unknown"
    # which is handed on
    later = str(tmp_path / "later.pt")
    pretrain_here(shard, out=later, config=PretrainConfig(base=out, steps=1, batch_size=20))
    assert encoder_info(later).unknown_base == "tiny:weights.pt"


def test_what_does_not_go_with_a_base(folder, base, tmp_path, monkeypatch):
    out = str(tmp_path / "e.pt")

    def refuse(said, **settings):
        with pytest.raises(UsageError, match=said):
            pretrain_here(str(folder), out=settings.pop("out", out), config=PretrainConfig(steps=1, **settings))

    refuse("base.pt is no RN50: leave `--model` out, the architecture is that of the base", base=base, model="RN50")
    refuse("is the base itself, which is needed until training is done: give another `out`", base=base, out=base)
    refuse("there is no encoder file 'no/such.pt'", base="no/such.pt")
    refuse("an untrained encoder sees nothing", base="tiny")
    config = {"model_cfg": model_config("tiny"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(load_checkpoint(base).state_dict, tmp_path / "open_clip_pytorch_model.bin")
    refuse(
        "local-dir:.* cannot be trained further: give an encoder file, ARCHITECTURE:FILE or",
        base=f"local-dir:{tmp_path}",
    )
    assert not (tmp_path / "e.pt").exists()


def test_a_published_model_is_rebuilt_as_open_clip_made_it(base, tmp_path, monkeypatch):
    """With a stand-in for the download: the weights come from a file, the preprocessing from the tag."""
    made = build_model("ViT-S-32-alt", seed=1)
    settings = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["mine"])
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: made)
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: settings)
    encoder = load_encoder("ViT-S-32-alt:mine")
    assert weights_sha256(build_model(encoder.config, seed=1)) == encoder.weights_sha256
    assert encoder.config["preprocess_cfg"] == settings
    assert build_tokenizer(encoder.config)(["a dog"]).equal(encoder.tokenizer(["a dog"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "BASE", "--model", "RN50"], "base.pt is no RN50: leave `--model` out"),
        (["--from", "none.pt"], "there is no encoder file 'none.pt'"),
        (["--from", "RN50:nothing"], "neither a file of weights nor a tag of RN50"),
        (["--losses", "OUT"], "`losses` and `out` are both"),
        (["--lr", "0"], "--train.lr"),
    ],
)
def test_wrong_arguments_end_with_2_before_any_work(monkeypatch, capsys, folder, base, tmp_path, arguments, words):
    out = str(tmp_path / "e.pt")
    names = {"BASE": base, "OUT": out}
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        sys, "argv", ["tarsift", "pretrain", str(folder), "-o", out, *(names.get(a, a) for a in arguments)]
    )
    monkeypatch.setattr(cli, "stop_on_signals", lambda: None)
    started = []
    monkeypatch.setattr("tarsift.pipelines.pretrain.session", lambda: started.append(1) or nullcontext())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert words in printed.err
    assert not started
    assert not list(tmp_path.iterdir())
