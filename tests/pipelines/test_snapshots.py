"""Interrupted trainings: the same call goes on from the last snapshot, to the same bytes where that is promised."""

import json
import os
import signal
from dataclasses import asdict

import pytest
import torch

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, Interrupted, TarsiftError, UsageError
from tarsift.operators.models import load_checkpoint, model_config
from tarsift.operators.shards import ReadConfig
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tarsift.pipelines.snapshots import Snapshots
from tarsift.pipelines.training import TrainConfig
from tests.conftest import make_dump


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_dump(folder, shards=2, samples=30)
    return str(folder)


def config(**settings) -> PretrainConfig:
    return PretrainConfig(**{"steps": 9, "batch_size": 16, "snapshot_s": 0, **settings})


class Crash(Exception):
    pass


def crash_at(crashing: int):
    def on_step(step: int, loss: float) -> None:
        if step == crashing:
            raise Crash

    return on_step


@pytest.fixture
def dropping(tmp_path) -> str:
    """A model whose training draws random numbers."""
    settings = model_config("tiny")
    settings["vision_cfg"]["timm_drop"] = 0.3
    (tmp_path / "dropping.json").write_text(json.dumps(settings))
    return str(tmp_path / "dropping.json")


@pytest.mark.parametrize("kind", ["plain", "dropout and losses", "bf16"])
def test_goes_on_to_the_same_bytes(shards, tmp_path, dropping, kind):
    def train(name, **arguments):
        more = {"train": TrainConfig(precision="bf16")} if kind == "bf16" else {}
        if kind == "dropout and losses":
            more = {"model": dropping, "losses": str(tmp_path / f"{name}.parquet")}
        return pretrain_here(shards, out=str(tmp_path / f"{name}.pt"), config=config(**more), **arguments)

    whole = train("whole")
    for crashing in (3, 7):  # twice, at steps 2 and 6; an epoch has 3
        with pytest.raises(Crash):
            train("broken", on_step=crash_at(crashing))
        assert not (tmp_path / "broken.pt").exists()
    steps = []
    summary = train("broken", on_step=lambda step, loss: steps.append(step))
    assert steps == [7, 8, 9]
    assert summary.went_on_from == 6
    same = {"checkpoint": "", "wall_s": 0, "went_on_from": 0}
    assert {**asdict(summary), **same} == {**asdict(whole), **same}
    one, other = load_checkpoint(tmp_path / "whole.pt"), load_checkpoint(tmp_path / "broken.pt")
    assert all(torch.equal(value, other.state_dict[name]) for name, value in one.state_dict.items())
    if kind == "dropout and losses":
        assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "broken.parquet").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_training_that_has_ended_is_not_done_again(shards, tmp_path):
    out, losses, steps = tmp_path / "e.pt", tmp_path / "l.parquet", []

    def train(force=False, **settings):
        steps.clear()
        wanted = config(**{"steps": 2, "losses": str(losses), **settings})
        return pretrain_here(shards, out=str(out), config=wanted, force=force, on_step=lambda step, _: steps.append(1))

    first, written = train(), out.stat().st_mtime_ns
    again = train(threads=2)
    assert not steps
    assert out.stat().st_mtime_ns == written
    assert {**asdict(again), "wall_s": 0} == {**asdict(first), "wall_s": 0, "went_on_from": 2}

    def done_anew(prepare=lambda: None, **settings):
        prepare()
        train(**settings)
        return len(steps) == settings.get("steps", 2)

    def change_a_weight():
        content = torch.load(out, weights_only=True)
        content["state_dict"]["logit_scale"] += 1
        torch.save(content, out)

    assert done_anew(force=True)
    assert done_anew(losses.unlink)
    assert done_anew(lambda: losses.write_bytes(b"no Parquet"))
    assert done_anew(lambda: out.write_bytes(b"no encoder"))
    assert done_anew(change_a_weight)
    assert train().weights_sha256 == first.weights_sha256
    assert not steps
    assert done_anew(seed=1)
    assert done_anew(steps=3)
    assert done_anew(steps=3, read=ReadConfig(max_image_bytes=1 << 20))


def test_dropout_depends_on_the_seed_alone_and_leaves_the_callers_random_state(shards, tmp_path, dropping):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = pretrain_here(shards, out=str(tmp_path / "1.pt"), config=config(steps=2, model=dropping))
    assert torch.rand(1) == expected
    assert one.loss == pretrain_here(shards, out=str(tmp_path / "2.pt"), config=config(steps=2, model=dropping)).loss


def test_a_stream_goes_on_at_the_step(shards, tmp_path):
    streamed = config(cache_bytes=0, shuffle=10)
    with pytest.raises(Crash):
        pretrain_here(shards, out=str(tmp_path / "e.pt"), config=streamed, on_step=crash_at(6))
    steps = []
    out = str(tmp_path / "e.pt")
    summary = pretrain_here(shards, out=out, config=streamed, on_step=lambda step, loss: steps.append(step))
    assert steps == [6, 7, 8, 9]
    assert (summary.went_on_from, summary.steps) == (5, 9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_finishes_the_step_and_keeps_it(shards, tmp_path, number):
    out = tmp_path / "e.pt"
    before = signal.signal(number, signal.default_int_handler)  # a shell may have had its background ignore SIGINT
    try:
        with pytest.raises(Interrupted, match=r"stopped after 4 of 9 steps, which .*e\.pt\.part keeps"):
            pretrain_here(
                shards,
                out=str(out),
                config=config(snapshot_s=60),
                on_step=lambda step, loss: os.kill(os.getpid(), number) if step == 4 else None,
            )
        assert pretrain_here(shards, out=str(out), config=config(snapshot_s=60)).went_on_from == 4
        # at the last step there is nothing left to stop
        last = {"on_step": lambda step, loss: os.kill(os.getpid(), number) if step == 9 else None}
        assert pretrain_here(shards, out=str(out), config=config(snapshot_s=60), force=True, **last).steps == 9
    finally:
        signal.signal(number, before)
    assert [f.name for f in tmp_path.iterdir()] == ["e.pt"]


def test_other_settings_are_refused_and_named(shards, tmp_path):
    out = str(tmp_path / "e.pt")
    with pytest.raises(Crash):
        pretrain_here(shards, out=out, config=config(), on_step=crash_at(3))
    said = r"e\.pt\.part keeps 2 of 9 steps of a training with other settings: seed: 0 -> 1; train\.lr: 0\.004 -> 0\.1"
    with pytest.raises(ChangedError, match=said):
        pretrain_here(shards, out=out, config=config(seed=1, train=TrainConfig(lr=0.1)))
    with pytest.raises(ChangedError, match="shards: "):
        pretrain_here(f"{shards}/00000.tar", out=out, config=config(batch_size=10))
    with pytest.raises(ChangedError, match="losses: False -> True"):
        pretrain_here(shards, out=out, config=config(losses=str(tmp_path / "l.parquet")))
    # how the work is spread is no matter
    with pytest.raises(Crash):
        pretrain_here(shards, out=out, config=config(threads=2, decoders=1), on_step=crash_at(4))
    assert pretrain_here(shards, out=out, config=config(seed=1), force=True).went_on_from == 0
    assert not (tmp_path / "e.pt.part").exists()


def test_what_is_no_snapshot_is_in_the_way(shards, tmp_path):
    out, part = str(tmp_path / "e.pt"), tmp_path / "e.pt.part"
    for content in (b"", b"mine\n", b"[]\n", b'{"format": "other"}\n'):
        part.write_bytes(content)
        with pytest.raises(UsageError, match="is in the way: it is no snapshot of a training; --force begins anew"):
            pretrain_here(shards, out=out, config=config())
    with pytest.raises(Crash):
        pretrain_here(shards, out=out, config=config(), on_step=crash_at(3), force=True)
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(TarsiftError, match="cannot be read as a file of tensors"):
        pretrain_here(shards, out=out, config=config())
    part.write_bytes(part.read_bytes().replace(b'"version": 1', b'"version": 9', 1))
    with pytest.raises(ChangedError, match="by another version of tarsift"):
        pretrain_here(shards, out=out, config=config())


def test_snapshots_on_other_storage_and_when_they_are_due(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tarsift.pipelines.snapshots.time.monotonic", lambda: now[0])
    snapshots = Snapshots("memory://models/e.pt", {"steps": 5, "ks": (1, 2)}, every_s=60)
    assert (snapshots.step(), snapshots.read()) == (0, None)
    now[0] = 159.0
    assert not snapshots.due()
    now[0] = 160.0
    assert snapshots.due()
    monkeypatch.setattr(
        "tarsift.pipelines.snapshots.torch.save", lambda *_: now.__setitem__(0, now[0] + 10), raising=True
    )
    snapshots.write(1, {})
    now[0] += 199  # writing took ten seconds, a twentieth of 200
    assert not snapshots.due()
    now[0] += 1
    assert snapshots.due()
    monkeypatch.undo()
    Snapshots("memory://models/e.pt", {"steps": 5, "ks": (1, 2)}).write(3, {"a": torch.arange(3)})
    assert snapshots.step() == 3
    assert torch.equal((snapshots.read() or {})["a"], torch.arange(3))
    snapshots.remove()
    snapshots.remove()
    assert not storage.exists("memory://models/e.pt.part")
