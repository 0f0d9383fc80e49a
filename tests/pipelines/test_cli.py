"""The command line: what it refuses, with which exit code and words; the plan; what it prints."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from tarsift.operators.errors import ConfigError
from tarsift.pipelines import cli, options, printing
from tarsift.pipelines.progress import Event, PlainLines, RichBars, listener_for, silent


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tarsift", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clean", "DUMP", "--out", "OUT"], "no encoder: give --encoder detect=MODEL"),
        (["clean", "DUMP", "--out", "OUT", "--encoder", "enc.pt"], "--encoder takes ROLE=MODEL, got 'enc.pt'"),
        (["clean", "nowhere/*.tar", "--out", "OUT", "--encoder", "detect=ENC"], "nowhere"),
        (
            ["clean", "DUMP", "--out", "OUT", "--encoder", "detect=ENC", "--set", "flag.vallue=1"],
            "did you mean flag.value",
        ),
        (["clean", "DUMP", "--out", "OUT", "--encoder", "detect=ENC", "--set", "x"], "--set takes name=value"),
        (
            ["clean", "DUMP", "--out", "OUT", "--encoder", "detect=ENC", "--fraction", ".1", "--min-z", "3"],
            "exclude each",
        ),
        (
            ["clean", "DUMP", "--out", "OUT", "--encoder", "detect=ENC", "--on-error", "bogus=drop"],
            "unknown error reason",
        ),
        (["clean", "DUMP", "--out", "OUT", "--encoder", "detect=missing.pt"], "missing.pt"),
        (["score", "OUT"], "holds no run.json"),
        (["flag", "OUT", "--fraction", "0.1"], "holds no run.json"),
        (["report", "OUT"], "holds no run.json"),
        (["poison", "DUMP", "--out", "OUT", "--attack", "bomb"], "there is no attack 'bomb'"),
        (["pretrain", "DUMP", "--out", "OUT", "--model", "tinny"], "tiny"),
        (["evaluate", "OUT", "--truth", "none.parquet"], "run.json"),
        (["demo", "--samples", "500", "--epochs", "0"], "epochs"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line_before_any_work(
    monkeypatch, capsys, dump, encoder, tmp_path, arguments, words
):
    out = tmp_path / "out"
    names = {"DUMP": str(dump), "OUT": str(out), "ENC": encoder, "detect=ENC": f"detect={encoder}"}
    code, _, err = run(monkeypatch, capsys, *(names.get(a, a) for a in arguments))
    assert code == 2, err
    assert words in err
    assert "Traceback" not in err
    assert not out.exists()


def test_dry_run_prints_plan_and_settings_and_touches_nothing(monkeypatch, capsys, dump, encoder, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "clean",
        str(dump),
        "--out",
        str(out),
        "--encoder",
        f"detect={encoder}",
        "--fraction",
        "0.02",
        "--dry-run",
    ]
    code, printed, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    for words in (
        "5 shards",
        "embed.detect",
        "0/5",
        "Poison rates up to 5.0% are covered",
        "value: 0.02",
        "not known before",
        "by the beginning of a shard",
        "of object store",
    ):
        assert words in printed
    assert not out.exists()


def test_hostile_text_in_an_error_cannot_reach_the_terminal(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "score", str(tmp_path / "\x1b[31mred[bold]"))
    assert code == 2
    assert "\x1b" not in err
    assert "?[31mred[bold]" in err


def test_verdict_flags_become_settings():
    settings = options.verdict_settings(None, 3.5, None, "slof_k16", ["drop", "missing_caption=keep"], "quarantine")
    assert settings == {
        "flag.policy": "score",
        "flag.value": 3.5,
        "flag.score": "slof_k16",
        "flag.on_error": {"all": "drop", "missing_caption": "keep"},
        "flag.on_bad_shard": "quarantine",
    }
    with pytest.raises(ConfigError):
        options.encoder_settings(["detect="])


def test_a_demo_without_poison_claims_nothing():
    from tarsift.pipelines.demo import DemoSummary

    console = Console(record=True, width=80)
    summary = DemoSummary(500, 0, 25, 0.9, 0.89, 10.0, f"/{'long/' * 10}r.html")
    printing.print_demo(summary, f"/{'long/' * 10}o", console)
    text = " ".join(console.export_text().split())
    assert f"/{'long/' * 10}o/summary.json" in text  # a path is never broken across lines
    assert "Nothing was planted" in text
    assert "no finding, and no proof that a corpus is clean" in text
    assert "banana" not in text
    assert "auroc" not in summary.to_json()


def test_progress_is_plain_in_a_log_and_silent_in_a_library(capsys):
    lines = PlainLines(every_s=1000, stream=sys.stderr)
    for done in range(4):
        lines(Event("embed", done, 3, samples=done * 10, finished=done == 3, note="all"))
    err = capsys.readouterr().err.splitlines()
    assert len(err) <= 2
    assert err[-1].startswith("embed: 3/3 shards, 30 samples")
    assert silent(Event("x", 1, 1)) is None
    assert isinstance(listener_for(Console(force_terminal=True), quiet=False), RichBars)
    assert listener_for(Console(), quiet=True) is silent
    with RichBars(Console(force_terminal=True, record=True)) as bars:
        bars(Event("embed", 1, 3, samples=5))
        bars(Event("embed", 3, 3, finished=True))


def test_the_installed_command_answers():
    found = subprocess.run([sys.executable, "-m", "tarsift.pipelines.cli", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "Main job" in found.stdout


def test_json_goes_to_stdout(capsys):
    printing.write_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_paths_in_a_summary_are_never_broken():
    from tarsift.pipelines.clean import CleanResult

    out = f"/{'long/' * 20}o"
    counts = {"read": 10, "kept": 8, "removed": 1, "errored": 1, "errors": {"missing_caption": 1}}
    console = Console(record=True, width=80)
    printing.print_result(CleanResult(out, counts, {}, f"{out}/report.html", 3.0), console)
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == ["read", "kept", "removed", "errored", "report"]
    assert lines[1].split()[-1] == f"{out}/clean"
    assert "missing_caption 1" in lines[3]
