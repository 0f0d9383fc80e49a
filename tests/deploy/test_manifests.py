"""Manifests are valid by the schemas in tests/vendor/ and Ray's own, and say what deploy/README.md says they do."""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tarsift.operators.errors import EXIT_CODES
from tarsift.pipelines import sizing
from tests.deploy.found import DEPLOY, ROOT, document, documents, pod_of, problems, ray_job_specs, sources, validator

KUBERNETES = ["kuberay/cronjob.yaml", "kuberay/raycluster.yaml", "kuberay/raycronjob.yaml", "kuberay/rayjob.yaml",
              "kuberay/rbac.yaml"]  # fmt: skip
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def clusters() -> dict[str, dict[str, Any]]:
    """The Ray cluster of every manifest that has one."""
    found = {"raycluster.yaml": document("kuberay/raycluster.yaml")["spec"]}
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        (spec,) = ray_job_specs(DEPLOY / "kuberay" / name)
        found[name] = spec["rayClusterSpec"]
    return found


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def all_containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(where, pod, container) of every manifest."""
    pods = [(f"{file} {name}", group["template"]["spec"])
            for file, cluster in clusters().items() for name, group in groups(cluster).items()]  # fmt: skip
    pods.append(("cronjob.yaml", pod_of(document("kuberay/cronjob.yaml"))))
    return [(where, pod, container) for where, pod in pods for container in pod["containers"]]


def quantity(text: str) -> float:
    """Bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)?", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(number) * 1024 ** (0 if unit is None else 1 + ["Ki", "Mi", "Gi", "Ti"].index(unit))


def test_every_yaml_file_is_looked_at():
    known = {*KUBERNETES, "kuberay/kustomization.yaml", "ray/aws.yaml"}
    assert {path.relative_to(DEPLOY).as_posix() for path in sources() if path.suffix in (".yaml", ".yml")} == known


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_manifest_is_valid(name):
    for one in documents(name):
        assert problems(one) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("kuberay/rayjob.yaml", "spec.shutdownAfterJobFinish", True),
        ("kuberay/rayjob.yaml", "spec.backoffLimit", "2"),
        ("kuberay/rayjob.yaml", "spec.rayClusterSpec", None),
        ("kuberay/rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("kuberay/rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.template.spec.container", []),
        ("kuberay/rayjob.yaml", "metadata.name", "tarsift_clean"),
        ("kuberay/raycluster.yaml", "spec.workerGroupSpecs", {}),
        ("kuberay/raycluster.yaml", "spec.rayVersion", 2.6),
        ("kuberay/raycronjob.yaml", "spec.concurrencyPolicy", "Forbid"),
        ("kuberay/raycronjob.yaml", "spec.schedule", None),
        ("kuberay/cronjob.yaml", "spec.concurrencyPolicy", True),
        ("kuberay/cronjob.yaml", "spec.jobTemplate.spec.podFailurePolicy.rules", [{"onExitCodes": {"values": [75]}}]),
        ("kuberay/cronjob.yaml", "spec.jobTemplate.spec.template.spec.containers", [{"image": "x"}]),
    ],
)
def test_a_manifest_that_is_not_valid_is_noticed(name, path, value):
    changed = copy.deepcopy(document(name))
    *through, last = path.split(".")
    at = changed
    for key in through:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    assert problems(changed)


def test_a_kind_without_a_schema_is_noticed():
    with pytest.raises(KeyError):
        validator("v1 Secret")


def test_the_schemas_are_schemas():
    for path in (ROOT / "tests" / "vendor").glob("*.json"):
        content = json.loads(path.read_text())
        for definition in content["$defs"].values():
            jsonschema.Draft202012Validator.check_schema(definition)


def launcher_problems(config: dict[str, Any]) -> list[str]:
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.origin is not None
    schema = json.loads((Path(package.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)]


def test_the_cluster_of_machines_is_valid_and_complete():
    config = document("ray/aws.yaml")
    assert launcher_problems(config) == []
    assert launcher_problems({**config, "idle_timeout_minute": 5})
    assert launcher_problems({**config, "max_workers": "8"})
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["head"]["resources"] == {"CPU": 0}
    assert (types["cpu"]["min_workers"], types["gpu"]["min_workers"]) == (1, 0)
    assert types["cpu"]["max_workers"] + types["gpu"]["max_workers"] <= config["max_workers"]
    # What is left out, Ray fills from defaults that install another Ray; and a dashboard for everybody.
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []
    (start,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "--entrypoint=tini" in config["docker"]["run_options"]


def test_one_cluster_for_all():
    """Those of the jobs are the same; the one that stays has no worker without work."""
    found = clusters()
    assert found["rayjob.yaml"] == found["raycronjob.yaml"]
    staying = copy.deepcopy(found["raycluster.yaml"])
    for group in staying["workerGroupSpecs"]:
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
    staying["workerGroupSpecs"][0].update({"minReplicas": 1, "replicas": 1})
    assert staying == found["rayjob.yaml"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "raycluster.yaml"])
def test_a_cluster_is_what_the_readme_says(name):
    cluster = clusters()[name]
    assert cluster["rayVersion"] == PINNED["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    found = groups(cluster)
    assert found["head"]["rayStartParams"]["num-cpus"] == "0"
    assert found["gpu"]["minReplicas"] == found["gpu"]["replicas"] == 0 < found["gpu"]["maxReplicas"]
    gpus = {
        group: container_of(spec)["resources"].get("limits", {}).get("nvidia.com/gpu") for group, spec in found.items()
    }
    assert gpus == {"head": None, "cpu": None, "gpu": "1"}
    images = {group: container_of(spec)["image"].rpartition(":")[2] for group, spec in found.items()}
    assert images == {"head": "cpu", "cpu": "cpu", "gpu": "cuda"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "raycluster.yaml"])
def test_memory_and_object_store_fit_what_the_cost_model_says(name):
    for group, spec in groups(clusters()[name]).items():
        container = container_of(spec)
        store = int(spec["rayStartParams"]["object-store-memory"])
        (shm,) = [volume["emptyDir"] for volume in spec["template"]["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert store <= quantity(shm["sizeLimit"])
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        cpus, encoders = int(resources["requests"]["cpu"]), int(group == "gpu")
        if group == "head":
            cpus = encoders = 0
        encoder = sizing.ENCODERS["ViT-L-14"]
        assert store >= sizing.object_store_bytes(cpus, encoders=encoders, image_size=encoder.image_size), group
        memory = sizing.memory_bytes(cpus, encoders=encoders, mparams=encoder.mparams, on_gpu=True)
        assert quantity(resources["limits"]["memory"]) >= memory + store, group


def test_a_stop_is_given_its_time():
    """Ray waits for the command, the head's pod for both, and the workers' pods as long as the head's."""
    for cluster in clusters().values():
        found = groups(cluster)
        waits = {entry["name"]: entry["value"] for entry in container_of(found["head"])["env"]}
        stop_s = int(waits["RAY_JOB_STOP_WAIT_TIME_S"])
        lingers = container_of(found["head"])["lifecycle"]["preStop"]["exec"]["command"]
        assert lingers[:2] == ["timeout", str(stop_s)]
        assert found["head"]["template"]["spec"]["terminationGracePeriodSeconds"] > stop_s
        for group in ("cpu", "gpu"):
            assert container_of(found[group])["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(stop_s)]
            assert found[group]["template"]["spec"]["terminationGracePeriodSeconds"] > stop_s


def test_the_head_waits_for_a_command_that_runs(tmp_path):
    """The loop of its preStop ends when no process is called tarsift any more; other names do not keep it."""
    script = container_of(clusters()["rayjob.yaml"]["headGroupSpec"])["lifecycle"]["preStop"]["exec"]["command"][-1]

    def ends(name: str) -> bool:
        (tmp_path / name).write_text("#!/bin/sh\nread line\n")
        (tmp_path / name).chmod(0o755)
        with subprocess.Popen([tmp_path / name], stdin=subprocess.PIPE) as process:
            comm = Path(f"/proc/{process.pid}/comm")
            while comm.read_text().strip() != name:
                pass
            looked = script.replace("/proc/[0-9]*/comm", str(comm)).replace("sleep 1", "exit 9")
            code = subprocess.run(["sh", "-c", looked]).returncode
            process.communicate(b"\n")
        return code == 0

    assert not ends("tarsift")
    assert ends("tarsift2")


def test_pods_run_without_rights_and_secrets_are_named_only():
    for where, pod, container in all_containers():
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
        for variable in container.get("env", []):
            assert "value" not in variable or not re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]), where
    for path in sources():
        assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key\s*[=:]", path.read_text()), path


def test_no_registry_is_named():
    """Where packages come from is up to who builds."""
    for path in [*sources(), ROOT / ".dockerignore"]:
        assert not re.search(r"index-url|find-links|files\.|/simple\b", path.read_text(), re.IGNORECASE), path


def decision(policy: dict[str, Any], code: int) -> str:
    """What a podFailurePolicy does with an exit code: the first rule that fits, as the API's reference has it."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


def check_policy(policy: dict[str, Any]) -> None:
    assert decision(policy, EXIT_CODES["interrupted"]) == "Count"
    assert {decision(policy, code) for name, code in EXIT_CODES.items() if name not in ("done", "interrupted")} == {
        "FailJob"
    }
    assert decision(policy, 137) == decision(policy, 143) == "Count"  # the waiting pod was killed or stopped
    assert policy["rules"][0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}


def test_the_nightly_job_tries_75_again_and_nothing_else():
    spec = document("kuberay/cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] > 0
    check_policy(job["podFailurePolicy"])
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a policy needs it


def test_names_refer_to_what_is_there():
    account, role, binding = documents("kuberay/rbac.yaml")
    pod = pod_of(document("kuberay/cronjob.yaml"))
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account["metadata"]["name"]]
    kustomization = document("kuberay/kustomization.yaml")
    (made,) = kustomization["configMapGenerator"]
    (volume,) = pod["volumes"]
    assert volume["configMap"]["name"] == made["name"]
    assert kustomization["generatorOptions"]["disableNameSuffixHash"] is True
    for name in [*kustomization["resources"], *made["files"]]:
        assert (DEPLOY / "kuberay" / name).is_file()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_puts_the_night_together():
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / "kuberay"], capture_output=True, text=True, check=True)
    made = list(yaml.safe_load_all(done.stdout))
    assert [one["kind"] for one in made] == ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob"]
    (files,) = [one["data"] for one in made if one["kind"] == "ConfigMap"]
    assert yaml.safe_load(files["rayjob.yaml"]) == document("kuberay/rayjob.yaml")
    assert files["nightly.py"] == (DEPLOY / "kuberay" / "nightly.py").read_text()
