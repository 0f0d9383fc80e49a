"""Every tarsift command in deploy/ is one that the command line takes, and its settings are known ones."""

import re
from typing import Any

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from tarsift.operators.errors import ConfigError
from tarsift.pipelines.cli import app
from tarsift.pipelines.config import load_config
from tarsift.pipelines.options import encoder_settings
from tests.deploy.found import DEPLOY, ROOT, commands_in, sources

COMMANDS: dict[str, Any] = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
FOUND = [(path.relative_to(ROOT).as_posix(), words) for path in sources() for words in commands_in(path)]


def parsed(words: list[str]) -> Any:
    """Parse a command as the command line does, without running it: its context; None if help is asked for."""
    assert words[0] == "tarsift"
    if words[1:] in (["--help"], ["-h"]):
        return None
    return COMMANDS[words[1]].make_context(words[1], list(words[2:]))


def check(words: list[str]) -> None:
    context = parsed(words)
    if context is not None and "set_" in context.params:
        load_config(None, context.params["set_"] or [], **encoder_settings(context.params.get("encoder")))


@pytest.mark.parametrize(("where", "words"), FOUND, ids=[f"{where}-{i}" for i, (where, _) in enumerate(FOUND)])
def test_a_command_is_one_that_is_taken(where, words):
    check(words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tarsift swallow s3://bucket/dump", "swallow"),
        ("tarsift clean s3://bucket/dump", "--out"),
        ("tarsift clean s3://bucket/dump --out o --no-such-option", "no-such-option"),
        ("tarsift clean s3://bucket/dump --out o --workers 0", "greater than or equal to 1"),
        ("tarsift clean s3://bucket/dump --out o --set resources.no_such=1", "no_such"),
        ("tarsift clean s3://bucket/dump --out o --encoder enc.pt", "ROLE=MODEL"),
    ],
)
def test_a_command_that_is_not_taken_is_noticed(text, says):
    with pytest.raises((KeyError, TyperException, ConfigError)) as error:
        check(text.split())
    told = error.value
    assert says in (told.format_message() if hasattr(told, "format_message") else str(told))


def test_none_is_overlooked():
    """As many are found as a plain search for `tarsift COMMAND ARGUMENT` finds, which knows nothing of quoting."""
    names = "|".join(COMMANDS)
    spelled = re.compile(rf"""\btarsift["',\s\\]+(?:-\s+)?(?:{names})\b["',]*[\s\\]+(?=[^`.\s])(?!\.\.\.)""")
    for path in sources():
        text = path.read_text()
        listed = [words for words in commands_in(path) if len(words) > 2]
        told = [
            m
            for m in spelled.finditer(text)
            if not re.match(r"\.\.\.|--dry-run|'s3://bucket/dump/\{day", text[m.end() :])
        ]
        of_images = len(re.findall(r"docker run .* tarsift:\w+ \w+ ", text))
        assert len(listed) == len(told) + of_images, path


def test_the_main_job_is_the_same_everywhere():
    """Of the dump, the encoder and OUT of the example; how the work is spread depends on the place."""
    main = {
        where: words[2:7]
        for where, words in FOUND
        if len(words) > 6 and words[1] == "clean" and "cc3m/{00000" in words[2]
    }
    assert set(main) == {
        "deploy/README.md", "deploy/kuberay/rayjob.yaml", "deploy/ray/aws.yaml", "deploy/slurm/tarsift.sbatch",
    }  # fmt: skip
    assert len({tuple(words) for words in main.values()}) == 1


def test_nodes_that_come_when_asked_for_are_asked_for():
    for name in ("kuberay/rayjob.yaml", "kuberay/cronjob.yaml", "kuberay/raycronjob.yaml", "ray/aws.yaml",
                 "airflow/tarsift_nightly.py"):  # fmt: skip
        for words in commands_in(DEPLOY / name):
            context = parsed(words)
            assert (context.params["workers"], context.params["gpus_per_worker"]) == (4, 1), name
            config = load_config(None, context.params["set_"])
            assert config.resources.stall_timeout_s >= 1800, name
