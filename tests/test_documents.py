"""Documents are true: generated references are up to date, the README's code runs, the layers hold."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_generated_references_are_up_to_date():
    found = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_module_says_what_it_is_for_in_one_line():
    for package in ("clip_detect", "operators", "pipelines", "sifters"):
        for path in (ROOT / package).glob("*.py"):
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert doc, path
            assert len(doc.splitlines()[0]) <= 120, path


def test_the_public_face_is_what_it_says():
    tarsift = importlib.import_module("tarsift")
    for name in tarsift.__all__:
        assert getattr(tarsift, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        tarsift.nonsense  # noqa: B018


def test_importing_tarsift_is_light():
    code = "import sys, tarsift; print([m for m in ('ray', 'torch', 'open_clip', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_python_of_the_readme_runs(ray_session, dump, encoder, tmp_path):
    from tarsift.pipelines.reading import read_shards

    (tmp_path / "enc.pt").write_bytes(Path(encoder).read_bytes())
    (tmp_path / "dump").symlink_to(dump)
    pairs = read_shards(str(dump)).select_columns(["image", "caption"]).to_pandas()
    pairs.rename(columns={"image": "photo", "caption": "text"}).to_parquet(tmp_path / "pairs.parquet")
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block.replace("/data", str(tmp_path)), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", ["README.md", "docs/trace.md"])
def test_shell_names_commands_and_flags_that_exist(page):
    from typer.main import get_command

    from tarsift.pipelines.cli import app

    commands = get_command(app).commands  # pyright: ignore
    lines = [line.strip() for block in blocks("sh", page) for line in block.replace("\\\n", " ").splitlines()]
    calls = [line.split("#")[0].split() for line in lines if line.startswith("tarsift ")]
    assert calls
    for call in calls:
        for single in " ".join(call).split("&&"):
            words = single.split()
            known = {o for p in commands[words[1]].params for o in (*p.opts, *p.secondary_opts)}
            assert {w for w in words if w.startswith("--")} <= known, single
