"""The DAG: what it says without Airflow, and what Airflow makes of it, in an environment of its own."""

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.found import DEPLOY, ROOT, document, pod_of, problems
from tests.deploy.test_manifests import check_policy

DAG = DEPLOY / "airflow" / "tarsift_nightly.py"
# The versions that were looked at; their own requirements are as they are on the day.
AIRFLOW = ["apache-airflow==3.3.2", "apache-airflow-providers-cncf-kubernetes==10.25.0"]


def test_its_codes_and_command_are_those_of_the_cronjob():
    assigned = {
        node.targets[0].id: node.value  # pyright: ignore
        for node in ast.parse(DAG.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    spec = document("kuberay/cronjob.yaml")["spec"]["jobTemplate"]["spec"]
    (again,) = [r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"] if r["action"] == "Count"]
    assert ast.literal_eval(assigned["AGAIN"]) == again
    (container,) = spec["template"]["spec"]["containers"]
    assert [word.replace("{{ ds }}", "{day}") for word in ast.literal_eval(assigned["COMMAND"])] == container["args"]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory) -> Path:
    """The Python of an environment with Airflow; skips, with the reason, where it cannot be installed."""
    folder = tmp_path_factory.mktemp("airflow")
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("there is no uv here: make setup")
    python = folder / "env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", ROOT / ".venv" / "bin" / "python", folder / "env"], check=True)
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, *AIRFLOW], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"Airflow cannot be installed: {done.stderr.strip()[-300:]}")
    return python


@pytest.mark.slow
def test_airflow_makes_the_job_of_it(airflow, tmp_path):
    (tmp_path / "kubeconfig").write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "none",
                "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
                "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
                "users": [{"name": "none", "user": {}}],
            }
        )
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))}
    variables |= {"AIRFLOW_HOME": str(tmp_path / "home"), "KUBECONFIG": str(tmp_path / "kubeconfig")}
    script = Path(__file__).parent / "ask_airflow.py"
    done = subprocess.run([airflow, script, DAG], capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["max_active_runs"], told["catchup"], told["retries"], told["waits"]) == (1, False, 0, True)
    job = told["job"]
    assert problems(job) == []
    check_policy(job["spec"]["podFailurePolicy"])
    ours, theirs = pod_of(document("kuberay/cronjob.yaml")), job["spec"]["template"]["spec"]
    (mine,), (made,) = ours["containers"], theirs["containers"]
    assert made["args"] == [word.replace("{day}", "2026-03-01") for word in mine["args"]]
    for name in ("command", "env", "image", "resources", "volumeMounts", "securityContext"):
        assert made[name] == mine[name], name
    for name in ("restartPolicy", "securityContext", "serviceAccountName", "volumes"):
        assert theirs[name] == ours[name], name
    assert (
        job["spec"]["backoffLimit"] == document("kuberay/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["backoffLimit"]
    )
    # The RayJob has this name; KubeRay takes 47 characters.
    assert len(job["metadata"]["name"]) <= 47
