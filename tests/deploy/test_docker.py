"""Dockerfiles: what they say, and the steps that fill the environment, run as a script: no container is at hand."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.found import DEPLOY, ROOT

FILES = ["Dockerfile", "Dockerfile.cuda"]


def instructions(name: str) -> list[tuple[str, str]]:
    text = (DEPLOY / "docker" / name).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = re.findall(r"^([A-Z]+) (.*)", re.sub(r"\\\n\s*", "", "\n".join(lines)), re.MULTILINE)
    assert "\n".join(lines).count("\n") >= len(found) > 8
    return found


def only(name: str, instruction: str) -> str:
    (value,) = [value for word, value in instructions(name) if word == instruction]
    return value


def environment_of(name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in only(name, "ENV").split())


def pins(path: Path) -> dict[str, str]:
    return dict(re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups() for line in path.read_text().splitlines())  # pyright: ignore


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_what_the_readme_says(name):
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", only(name, "FROM"))
    assert only(name, "USER") == "1000"
    assert json.loads(only(name, "ENTRYPOINT")) == ["tini", "--", "tarsift"]
    system, *_ = [value for word, value in instructions(name) if word == "RUN"]
    assert " tini " in system
    assert "useradd --uid 1000" in system
    words = [word for word, _ in instructions(name)]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))


def test_the_two_differ_by_the_gpu_alone():
    one, other = (dict(enumerate(instructions(name))) for name in FILES)
    assert len(one) == len(other)
    differing = {one[i][0] for i in one if one[i] != other[i]}
    assert differing == {"ENV", "RUN"}
    assert environment_of(FILES[1]).items() - environment_of(FILES[0]).items() == {
        ("NVIDIA_VISIBLE_DEVICES", "all"),
        ("NVIDIA_DRIVER_CAPABILITIES", "compute,utility"),
    }
    install = [next(v for w, v in instructions(name) if w == "RUN" and "uv pip" in v) for name in FILES]
    more = "--constraints constraints.txt --constraints deploy/docker/constraints-gpu.txt "
    expected = install[0].replace("[cpu,", "[gpu,").replace("--constraints constraints.txt ", more)
    assert install[1].split() == expected.split()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in install:
        (named,) = re.findall(r"\.\[([\w,]+)\]", text)
        assert set(named.split(",")) <= extras.keys()


def test_what_only_gpu_needs_is_pinned_beside_constraints():
    common, gpu = pins(ROOT / "constraints.txt"), pins(DEPLOY / "docker" / "constraints-gpu.txt")
    assert "faiss-gpu" in gpu
    assert "faiss-cpu" in common
    assert not common.keys() & gpu.keys()


def context_of_build(folder: Path) -> None:
    """Copy what .dockerignore lets through; it lists what is wanted, so this needs no rules of Docker's."""
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    wanted = [line[1:] for line in lines if line.startswith("!")]
    assert [line for line in lines if not line.startswith("!")] == ["**/__pycache__"]
    for name in wanted:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def test_the_context_holds_the_packages_and_no_more(tmp_path):
    context_of_build(tmp_path)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for folder in packages.values():
        assert (tmp_path / folder).is_dir(), folder
    held = {path.name for path in tmp_path.iterdir()}
    assert not held & {".git", ".venv", "tests", "benchmarks", "docs"}


def steps(name: str, root: Path) -> list[str]:
    """RUN lines for an environment, with /opt below `root`; the ones for the system are left out."""
    runs = [value for word, value in instructions(name) if word == "RUN"]
    system, *rest = runs
    assert system.startswith("apt-get update")
    assert not [run for run in rest if re.search(r"\b(apt-get|useradd)\b|/(var|etc|usr|home)\b", run)]
    return [run.replace("/opt/", f"{root}/opt/") for run in rest]


def surroundings(name: str, root: Path) -> dict[str, str]:
    """Variables of a step: the image's, but for the cache of uv, which is the machine's, and its Python as `python`."""
    (root / "bin").mkdir()
    (root / "bin" / "python").symlink_to(sys._base_executable)  # pyright: ignore[reportAttributeAccessIssue]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "VIRTUAL_ENV", "COV"))}
    own = {k: v for k, v in environment_of(name).items() if k not in ("PATH", "UV_NO_CACHE")}
    path = environment_of(name)["PATH"].replace("/opt/", f"{root}/opt/").replace("$PATH", f"{root}/bin:/usr/bin:/bin")
    return inherited | own | {"PATH": path}


def run(step: str, where: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(["sh", "-c", step], cwd=where, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (step, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.mark.slow
def test_the_steps_make_an_environment_of_pinned_packages(tmp_path):
    source = tmp_path / "opt" / "src"
    source.mkdir(parents=True)
    context_of_build(source)
    variables = surroundings("Dockerfile", tmp_path)
    printed = [run(step, source, variables) for step in steps("Dockerfile", tmp_path)]
    assert "Usage: tarsift" in printed[-1]
    listing = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    installed = dict(line.split("==") for line in run(f'python -c "{listing}"', tmp_path, variables).split())
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in installed.items()}
    pinned = pins(ROOT / "constraints.txt")
    assert {name: version for name, version in normal.items() if pinned.get(name) != version} == {"tarsift": "0.1.0"}
    # What a head needs to take jobs, and the modules of every extra.
    run(
        "ray --version && ray job submit --help && python -c 'import boto3, faiss, s3fs, kronfluence, ray.train'",
        tmp_path,
        variables,
    )
    assert "tarsift" in run("python -c 'import tarsift; print(tarsift.__file__)'", tmp_path, variables)
    assert str(tmp_path) in run("python -c 'import tarsift; print(tarsift.__file__)'", tmp_path, variables)


@pytest.mark.slow
def test_the_packages_of_the_cuda_image_go_together(tmp_path):
    """They are resolved, not installed: they are several gigabytes more."""
    source = tmp_path / "opt" / "src"
    source.mkdir(parents=True)
    context_of_build(source)
    variables = surroundings("Dockerfile.cuda", tmp_path)
    install, *_ = steps("Dockerfile.cuda", tmp_path)
    tried = re.sub(r"uv pip install --quiet", "uv pip install --dry-run", install)
    assert tried != install
    done = subprocess.run(["sh", "-c", tried], cwd=source, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = set(re.findall(r"^ \+ (\S+)", done.stdout + done.stderr, re.MULTILINE))
    for name, version in pins(DEPLOY / "docker" / "constraints-gpu.txt").items():
        assert f"{name}=={version}" in wanted
    pinned = pins(ROOT / "constraints.txt") | pins(DEPLOY / "docker" / "constraints-gpu.txt")
    assert {each.partition("==")[0] for each in wanted} - pinned.keys() == {"tarsift"}
    assert not any(each.startswith("faiss-cpu") for each in wanted)
