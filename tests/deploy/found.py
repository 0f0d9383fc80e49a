"""What is in deploy/: manifests with their schemas, and every tarsift command, wherever it stands."""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
VENDOR = ROOT / "tests" / "vendor"


@cache
def schemas() -> Registry:
    named = {path.name: Resource.from_contents(json.loads(path.read_text())) for path in VENDOR.glob("*.json")}
    return Registry().with_resources(named.items())


def validator(kind: str) -> Draft202012Validator:
    """The schema of `apiVersion kind`; a KeyError if there is none."""
    for file in ("kubernetes.json", "kuberay.json"):
        kinds = schemas()[file].contents["kinds"]
        if kind in kinds:
            reference = file + kinds[kind]["$ref"]
            return Draft202012Validator({"$ref": reference}, registry=schemas())
    raise KeyError(kind)


def problems(document: dict[str, Any]) -> list[str]:
    """What the schema of a document's kind says against it."""
    found = validator(f"{document['apiVersion']} {document['kind']}").iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def document(name: str) -> dict[str, Any]:
    (one,) = documents(name)
    return one


def sources() -> list[Path]:
    return sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def shell_words(text: str) -> list[str]:
    return shlex.split(text, comments=True)


def after(words: list[str], first: str) -> list[str]:
    """Words from `first` to the next operator of the shell."""
    rest = words[words.index(first) :]
    return rest[: next((i for i, word in enumerate(rest) if word in ("&&", ";", "|")), len(rest))]


def commands_in(path: Path) -> list[list[str]]:
    """Every tarsift command of a file, as words from `tarsift` on."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        # In a sentence, what names arguments; `tarsift clean --dry-run` speaks of an option.
        spans = [span for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) if len(span.split()) > 3]
        lines = [shell_words(line) for line in [*(line for block in blocks for line in block.splitlines()), *spans]]
        return [after(words, "tarsift") for words in lines if "tarsift" in words]
    if path.name.startswith("Dockerfile"):
        steps = [step.split() for run in re.findall(r"^RUN (.*)", text, re.MULTILINE) for step in run.split("&&")]
        entry, arguments = (
            json.loads(re.findall(rf"^{word} (.*)", text, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
        )
        runs = [re.split(r"tarsift:\w+ ", line)[1] for line in text.splitlines() if line.startswith("#   docker run")]
        called = [words for words in steps if words[0] == "tarsift"]
        return [*called, after(entry + arguments, "tarsift"), *(["tarsift", *run.split()] for run in runs)]
    if path.suffix == ".sbatch":
        (array,) = re.findall(r"^command=\((.*?)^\)", text, re.DOTALL | re.MULTILINE)
        return [shell_words(array)]
    if path.name == "tarsift_nightly.py":
        assigned = {node.targets[0].id: node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)}  # pyright: ignore
        return [ast.literal_eval(assigned["COMMAND"])]
    if path.name == "cronjob.yaml":
        (container,) = pod_of(document("kuberay/cronjob.yaml"))["containers"]
        return [container["args"]]
    if path.suffix == ".yaml":
        entries = [spec["entrypoint"] for spec in ray_job_specs(path)]
        quoted = re.findall(r'^#.*"(?:\w+=\S+ )?(tarsift .*)"$', text, re.MULTILINE)
        return [shell_words(entry) for entry in entries + quoted]
    return []


def ray_job_specs(path: Path) -> list[dict[str, Any]]:
    kinds = {"RayJob": lambda d: d["spec"], "RayCronJob": lambda d: d["spec"]["jobTemplate"]}
    return [kinds[d["kind"]](d) for d in yaml.safe_load_all(path.read_text()) if d.get("kind") in kinds]


def pod_of(cron_job: dict[str, Any]) -> dict[str, Any]:
    return cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
