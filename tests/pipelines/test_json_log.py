"""The log as JSON: every line of it is an object, whatever happens and whatever strangers wrote."""

import io
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tarsift.operators.errors import Interrupted
from tarsift.pipelines import json_log, printing
from tarsift.pipelines import status as status_recipe
from tarsift.pipelines.json_log import LONGEST, write_line
from tarsift.pipelines.progress import Event, JsonLines, listener_for, silent
from tests.pipelines.runs import tarsift
from tests.pipelines.test_cli import run


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv("TARSIFT_LOG", "json")
    monkeypatch.setattr(json_log, "take_warnings", lambda: None)  # it is for programs: pytest has its own handlers


def lines_of(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) and list(line)[:3] == ["time", "level", "event"] for line in lines)
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)
    assert {line["level"] for line in lines} <= {"info", "warning", "error"}
    return lines


def test_a_pass_is_told_at_its_ends_and_now_and_then():
    stream = io.StringIO()
    told = JsonLines(every_s=1000, stream=stream)
    for done in range(4):
        told(Event("embed.detect", done, 3, done * 10, errors={"bad_json": done}, repeated=done, finished=done == 3))
        told(Event("digest", done, 3, finished=done == 3))
    first, _, last, _ = lines_of(stream.getvalue())
    assert (first["event"], first["pass"], first["done"], first["samples_per_s"]) == (
        "pass_started",
        "embed.detect",
        0,
        None,
    )
    assert (last["event"], last["done"], last["total"], last["unit"]) == ("pass_finished", 3, 3, "shards")
    assert (last["samples"], last["errors"], last["repeated_requests"]) == (30, {"bad_json": 3}, 3)
    assert last["elapsed_s"] >= 0
    told.every_s = 0
    told(Event("write", 0, 2))
    told(Event("write", 1, 2))
    assert [line["event"] for line in lines_of(stream.getvalue())][-2:] == ["pass_started", "progress"]


def test_the_rate_is_that_of_now_and_not_of_what_was_done_before(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("tarsift.pipelines.progress.time.monotonic", lambda: next(clock))
    from tarsift.pipelines.progress import Paces

    pace = Paces()
    assert pace(Event("pretrain", 90, 100, samples=9000)) == (0.0, None)
    assert pace(Event("pretrain", 100, 100, samples=10_000, finished=True)) == (10.0, 100.0)


def test_no_text_by_strangers_breaks_a_line_or_does_anything_to_a_terminal(capsys):
    hostile = 'a"}\n{"level":"error"}\r\x1b[31m\u202e\u2028 \udcff'
    write_line("message", message=hostile, table={hostile: [hostile]})
    text = capsys.readouterr().err
    assert text.isascii()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    (line,) = lines_of(text)
    assert line["message"] == hostile
    assert line["table"] == {hostile: [hostile]}


def test_values_without_a_word_in_json_and_long_lists(capsys):
    write_line("result", loss=float("nan"), path=Path("/a"), many=list(range(LONGEST + 1)), few=(1, True, None, 0.5))
    (line,) = lines_of(capsys.readouterr().err)
    assert (line["loss"], line["path"], line["many"]) == (None, "/a", {"entries": LONGEST + 1})
    assert line["few"] == [1, True, None, 0.5]


def test_who_listens(as_json, monkeypatch):
    console = printing.Screen(file=io.StringIO(), force_terminal=True)
    assert isinstance(listener_for(console, quiet=False), JsonLines)
    assert listener_for(console, quiet=True) is silent
    monkeypatch.setenv("TARSIFT_LOG", "plain")
    assert not isinstance(listener_for(console, quiet=False), JsonLines)


def unforeseen(out: str) -> None:
    raise RuntimeError("403, url='http://user:hunter2@store.example/x'")


def interrupted(out: str) -> None:
    raise Interrupted("asked to stop")


@pytest.mark.parametrize(
    ("arguments", "recipe", "words", "kind"),
    [
        (["status", "OUT"], None, "holds no run.json", "UsageError"),
        (["status"], None, "Missing argument", None),
        (["clean", "x", "--out", "OUT", "--no-such"], None, "No such option", None),
        (["clean", "x", "--out", "OUT", "--encoder", "detect="], None, "--encoder takes ROLE=MODEL", "ConfigError"),
        (["nonsense"], None, "nonsense", None),
        (["status", "OUT"], unforeseen, "403, url='http://***@store.example/x'", "RuntimeError"),
        (["status", "OUT"], interrupted, "asked to stop", "Interrupted"),
        (["status", "--help"], None, None, None),
    ],
)
def test_errors_are_lines_too_and_exit_codes_the_same(
    monkeypatch, capsys, tmp_path, as_json, arguments, recipe, words, kind
):
    if recipe:
        monkeypatch.setattr(status_recipe, "status", recipe)
    arguments = [str(tmp_path / "nothing") if a == "OUT" else a for a in arguments]
    code, out, err = run(monkeypatch, capsys, *arguments)
    monkeypatch.delenv("TARSIFT_LOG")
    assert run(monkeypatch, capsys, *arguments)[0] == code
    if words is None:
        assert (code, err) == (0, "")
        assert "Usage" in out
        return
    assert out == ""
    (line,) = lines_of(err)
    assert (line["event"], line["exit_code"]) == ("error", code)
    assert line["level"] == ("warning" if code == 75 else "error")
    assert words in line["message"]
    assert kind in (None, line["type"])
    assert "hunter2" not in err
    assert ("traceback" in line) == (recipe is unforeseen)


def test_another_format_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TARSIFT_LOG", "jsonl")
    code, _, err = run(monkeypatch, capsys, "status", str(tmp_path))
    assert code == 2
    assert "TARSIFT_LOG is plain or json, got 'jsonl'" in err


def test_a_command_says_all_it_says_in_lines(monkeypatch, capsys, dump, ray_session, as_json):
    code, out, err = run(monkeypatch, capsys, "audit", str(dump))
    lines = lines_of(err)
    assert (code, out) == (4, "")
    assert [line["event"] for line in lines] == ["pass_started", "pass_finished", "result"]
    assert lines[1]["done"] == lines[1]["total"] == 5
    assert lines[2]["result"]["samples"] == lines[1]["samples"] == 400
    code, out, err = run(monkeypatch, capsys, "audit", str(dump), "--json", "--quiet")  # what is asked for is no log
    assert (code, err) == (4, "")
    assert json.loads(out)["samples"] == 400


def test_sentences_and_warnings_are_lines(as_json, capsys):
    printing.say("5 samples kept", quiet=False)
    printing.say("nothing", quiet=True)
    printing.sum_up({"kept": 5}, lambda console: console.print("5 kept"))
    printing.sum_up({"kept": 5}, lambda console: console.print("5 kept"), quiet=True)
    printing.warn("no page: [bold]")
    printed = capsys.readouterr()
    assert printed.out == ""
    said, result, warned = lines_of(printed.err)
    assert (said["message"], result["result"]) == ("5 samples kept", {"kept": 5})
    assert (warned["level"], warned["message"]) == ("warning", "no page: [bold]")


def test_a_program_that_is_killed_and_what_libraries_warn_of():
    """As the command runs: in a child that is watched over."""
    work = (
        "import os, signal, sys, warnings, logging; from tarsift.pipelines import cli, json_log; "
        "from tarsift.pipelines.supervisor import supervised\n"
        "def work():\n"
        "    json_log.take_warnings()\n"
        "    warnings.warn('old\\nway'); logging.getLogger('fsspec').error('%s retries', 3)\n"
        "    logging.getLogger('x').error('%s %s', 3)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(supervised(work))"
    )
    environment = {"TARSIFT_LOG": "json", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 75
    warned, logged, badly, killed = lines_of(done.stderr)
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert "old\nway" in warned["message"]
    assert (logged["level"], logged["logger"], logged["message"]) == ("error", "fsspec", "3 retries")
    assert badly["message"] == "%s %s"
    assert (killed["exit_code"], killed["level"]) == (75, "warning")
    assert "was ended by signal 9" in killed["message"]


def test_the_installed_command_logs_so(tmp_path):
    done = subprocess.run(
        tarsift("status", str(tmp_path)), capture_output=True, text=True, env={"TARSIFT_LOG": "json"}, timeout=120
    )
    (line,) = lines_of(done.stderr)
    assert (done.returncode, line["exit_code"], done.stdout) == (2, 2, "")
