"""Metrics: what is counted of a run, that it agrees with what the run says, and what Ray exports of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from tarsift.operators import retry
from tarsift.operators.errors import REASONS, Interrupted
from tarsift.pipelines import metrics
from tarsift.pipelines.metrics import METRICS, Reporter, reported
from tarsift.pipelines.progress import Event, silent
from tests.conftest import make_dump, make_encoder

ROOT = Path(__file__).resolve().parents[2]


class Recorded:
    """Takes values as Ray's metrics do: counters add up, gauges keep the last."""

    def __init__(self):
        self.values = Counter()

    def __call__(self, name, value, labels):
        metric = METRICS[name]
        assert set(labels) == set(metric.labels), name
        assert all(isinstance(text, str) for text in labels.values())
        key = (name.removeprefix("tarsift_"), *(labels[label] for label in metric.labels))
        if metric.kind == "counter":
            assert value > 0  # Ray raises
            self.values[key] += value
        else:
            self.values[key] = value

    def __getitem__(self, key):
        return self.values[key if isinstance(key, tuple) else (key,)]


def test_names_are_those_that_prometheus_expects():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"tarsift(_[a-z]+)+", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.what.endswith(".")
        # Nothing that grows with the dump.
        assert set(metric.labels) <= {"pass", "reason", "outcome", "verdict", "kind"}


def test_a_pass_counts_what_it_does_and_not_what_was_done_before():
    record, heard = Recorded(), []
    told = Reporter(heard.append, record)
    events = [
        Event("embed.detect", 2, 6),
        Event("embed.detect", 3, 6, 100, errors={"missing_caption": 2}, repeated=1),
        Event("embed.detect", 4, 6, 180, errors={"missing_caption": 2, "bad_json": 1, "<script>": 1}, repeated=4),
    ]
    for event in events:
        told(event)
    assert heard == events
    assert record["samples_total", "embed.detect"] == 180
    assert record["shards_total", "embed.detect"] == 2
    assert record["errored_samples_total", "embed.detect", "missing_caption"] == 2
    assert record["errored_samples_total", "embed.detect", "other"] == 1
    assert record["repeated_requests_total", "embed.detect"] == 4
    assert record["pass_running", "embed.detect"] == 1
    assert record["pass_done_ratio", "embed.detect"] == pytest.approx(4 / 6)
    assert record["passes_finished_total", "embed.detect"] == 0
    told(Event("embed.detect", 6, 6, 240, errors=events[-1].errors, repeated=4, finished=True))
    assert record["samples_total", "embed.detect"] == 240
    assert record["pass_running", "embed.detect"] == 0
    assert record["passes_finished_total", "embed.detect"] == record["passes_started_total", "embed.detect"] == 1
    told(Event("embed.detect", 6, 6))  # the same pass once more: nothing to do
    told(Event("embed.detect", 6, 6, finished=True))
    assert record["samples_total", "embed.detect"] == 240
    assert record["passes_finished_total", "embed.detect"] == 2


def test_only_shards_count_as_shards():
    record = Recorded()
    told = Reporter(silent, record)
    for event in (Event("pretrain", 0, 10, unit="steps"), Event("pretrain", 10, 10, 640, unit="steps", finished=True)):
        told(event)
    assert record["shards_total", "pretrain"] == 0
    assert record["samples_total", "pretrain"] == 640


def test_requests_that_the_driver_repeated_count_once():
    record = Recorded()
    retry.take_unreported()
    outer, inner = Reporter(silent, record), Reporter(silent, record)
    retry.add_repeated(3)
    inner(Event("pretrain", 0, 1))
    outer(Event("examine", 0, 1))
    assert record["repeated_requests_total", "pretrain"] == 3
    assert record["repeated_requests_total", "examine"] == 0
    assert retry.take_repeated() == 3  # and stand in run.json all the same


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done"),
        (ValueError("x"), "failed"),
        (Interrupted("x"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_how_a_run_ended_and_no_pass_of_it_runs_on(error, outcome):
    record = Recorded()

    def work():
        with reported(silent, record) as told:
            told(Event("write", 0, 3))
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    assert [key for key in record.values if key[0] == "runs_total"] == [("runs_total", outcome)]
    assert record["pass_running", "write"] == 0
    assert record["passes_finished_total", "write"] == 0


def test_gauges_are_set_again_as_long_as_the_work_lasts(monkeypatch):
    monkeypatch.setattr(metrics, "BEAT_S", 0.01)
    record = Recorded()
    with reported(silent, record) as told:
        told(Event("embed.detect", 1, 4))
        told.judged({"read": 9, "kept": 6, "removed": 2, "errored": 1, "errors": {}})
        at = record["last_progress_timestamp_seconds", "embed.detect"]
        assert abs(at - time.time()) < 60
        record.values.clear()  # as Ray forgets
        deadline = time.monotonic() + 30
        while not record["last_run_samples", "removed"]:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert record["pass_running", "embed.detect"] == 1
        assert record["pass_done_ratio", "embed.detect"] == 0.25
        assert record["last_progress_timestamp_seconds", "embed.detect"] == at  # a beat is no progress
    record.values.clear()
    time.sleep(0.05)
    assert not record.values


def test_metrics_that_fail_end_no_run_and_are_not_tried_again():
    tried, heard = [], []

    def refuse(*given):
        tried.append(given)
        raise RuntimeError("the agent is gone")

    with reported(heard.append, refuse) as told:
        for done in range(4):
            told(Event("embed.detect", done, 3, done, errors={"bad_json": done}, finished=done == 3))
        told.judged({"kept": 1})
    assert len(heard) == 4
    assert len(tried) == 1


def test_without_ray_nothing_happens(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_metric", lambda name: pytest.fail("a metric was made"))
    with reported(silent) as told:
        told(Event("embed.detect", 0, 1))
        told(Event("embed.detect", 1, 1, 5, finished=True))


def test_a_run_reports_what_it_says(monkeypatch, ray_session, tmp_path):
    """Through Ray's own metrics, which are made and take every value; what they took is written down beside that."""
    from tarsift.pipelines.audit import audit
    from tarsift.pipelines.clean import clean
    from tarsift.pipelines.config import load_config

    record, made = Recorded(), metrics._metric

    class Beside:
        def __init__(self, name):
            self.name, self.real = name, made(name)

        def inc(self, value, labels):
            self.real.inc(value, labels)
            record(self.name, value, labels)

        def set(self, value, labels):
            self.real.set(value, labels)
            record(self.name, value, labels)

    monkeypatch.setattr(metrics, "_metric", Beside)
    make_dump(tmp_path / "dump", shards=3, samples=60)
    encoder = make_encoder(tmp_path / "enc.pt", tmp_path / "dump")
    config = load_config(settings=["suspicion.published_ks=[8]", "suspicion.reference_size=64", "flag.value=0.1"])
    given = {"encoder": encoder, "config": config}
    counts = clean(str(tmp_path / "dump"), str(tmp_path / "out"), **given).counts
    for name in ("embed.detect", "density", "score", "flag", "write"):
        assert record["samples_total", name] == counts["read"] == 180, name
        assert record["shards_total", name] == 3, name
    errors = {key[2]: n for key, n in record.values.items() if key[:2] == ("errored_samples_total", "embed.detect")}
    assert errors == counts["errors"]
    assert set(errors) == {"undecodable_image", "missing_caption"} <= set(REASONS)
    assert {v: record["last_run_samples", v] for v in metrics.VERDICTS} == {v: counts[v] for v in metrics.VERDICTS}
    assert record["runs_total", "done"] == 1
    started = {key[1]: n for key, n in record.values.items() if key[0] == "passes_started_total"}
    finished = {key[1]: n for key, n in record.values.items() if key[0] == "passes_finished_total"}
    assert started == finished
    assert not any(n for key, n in record.values.items() if key[0] == "pass_running")

    clean(str(tmp_path / "dump"), str(tmp_path / "out"), **given)
    assert record["samples_total", "embed.detect"] == 180  # nothing was done again
    assert record["runs_total", "done"] == 2
    audit(str(tmp_path / "dump"))
    assert record["samples_total", "audit"] == 180


@pytest.fixture(scope="module")
def with_agents(tmp_path_factory) -> Path:
    """A folder with what `ray[default]` needs beside what is installed; skips where it cannot be installed."""
    uv, python = ROOT / ".uv" / "bin" / "uv", ROOT / ".venv" / "bin" / "python"
    if not uv.exists():
        pytest.skip("there is no uv here: make setup")
    install = [uv, "pip", "install", "--python", python]
    wanted = [*install, "--dry-run", "--constraints", ROOT / "constraints.txt", "ray[default]"]
    told = subprocess.run(wanted, capture_output=True, text=True)
    packages = re.findall(r"^ \+ (\S+)", told.stdout + told.stderr, re.MULTILINE)
    folder = tmp_path_factory.mktemp("agents")
    done = subprocess.run(
        [*install, "--quiet", "--no-deps", "--target", folder, *packages], capture_output=True, text=True
    )
    if told.returncode or done.returncode:
        pytest.skip(f"ray[default] cannot be installed: {(told.stderr + done.stderr).strip()[-300:]}")
    return folder


EXPORTED = """
import json, sys, time, urllib.request
import ray
from ray._private.utils import get_dashboard_dependency_error
from tarsift.pipelines.metrics import METRICS, count_night, reported
from tarsift.pipelines.progress import Event, silent
from tarsift.pipelines.session import session

def exported():
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
    return [line for line in lines if "tarsift" in line]

with session(num_cpus=1):
    if ray.nodes()[0]["MetricsExportPort"] <= 0:
        print(json.dumps({"no agent": repr(get_dashboard_dependency_error())}))
        sys.exit()
    with reported(silent):  # one that has ended
        pass
    count_night(1, 2)
    with reported(silent) as told:
        told(Event("embed.detect", 0, 4))
        told(Event("embed.detect", 1, 4, 50, errors={"bad_json": 2}, repeated=3))
        told(Event("score", 0, 1))
        told(Event("score", 1, 1, 50, finished=True))
        told.judged({"kept": 6, "removed": 2, "errored": 1})
        deadline, lines = time.monotonic() + 90, []
        while len({line.split("{")[0] for line in lines if line[0] != "#"}) < len(METRICS):
            if time.monotonic() > deadline:
                break
            time.sleep(1)
            lines = exported()
        time.sleep(35)  # over three intervals of Ray's export
        print(json.dumps({"first": lines, "later": exported()}))
"""


@pytest.mark.slow
def test_ray_exports_them_by_these_names(with_agents):
    path = os.pathsep.join(filter(None, [str(with_agents), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    if "no agent" in told:
        pytest.skip(f"Ray starts no agent here, which is what exports metrics: {told['no agent']}")
    kinds = dict(line.split()[2:4] for line in told["first"] if line.startswith("# TYPE"))
    assert kinds == {f"ray_{name}": metric.kind for name, metric in METRICS.items()}
    for name, metric in METRICS.items():
        lines = [line for line in told["first"] if line.startswith(f"ray_{name}{{")]
        assert lines, name
        for label in (*metric.labels, "SessionName"):
            assert all(f'{label}="' in line for line in lines), (name, label)
    values = {}
    for line in told["later"]:  # the gauges of what still runs are still there
        if line[0] != "#":
            name, labels = line.split("{")[0], dict(re.findall(r'(\w+)="([^"]*)"', line))
            values[(name, *(labels[label] for label in METRICS[name.removeprefix("ray_")].labels))] = float(
                line.split()[-1]
            )
    assert values["ray_tarsift_pass_running", "embed.detect"] == 1
    assert values["ray_tarsift_pass_done_ratio", "embed.detect"] == 0.25
    assert values["ray_tarsift_last_run_samples", "removed"] == 2
    assert values["ray_tarsift_samples_total", "embed.detect"] == 50
    assert values["ray_tarsift_errored_samples_total", "embed.detect", "bad_json"] == 2
    assert values["ray_tarsift_runs_total", "done"] == 1
    assert values["ray_tarsift_findings_total", "drift"] == 2
