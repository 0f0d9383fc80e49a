"""Reduce the JSON schemas that the package kubernetes-validate carries to the kinds that deploy/ uses.

    pip install kubernetes-validate==1.37.0
    python tests/vendor/reduce.py

Descriptions and extensions go; everything else of a definition stays as it is.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

RELEASE = "v1.37.0"
# By the names that manifests give them; the definitions are those of apiVersion/kind.
KINDS = {
    "batch/v1 CronJob": "io.k8s.api.batch.v1.CronJob",
    "batch/v1 Job": "io.k8s.api.batch.v1.Job",
    "v1 ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
    "v1 PodTemplate": "io.k8s.api.core.v1.PodTemplate",
    "rbac.authorization.k8s.io/v1 Role": "io.k8s.api.rbac.v1.Role",
    "rbac.authorization.k8s.io/v1 RoleBinding": "io.k8s.api.rbac.v1.RoleBinding",
}


def stripped(value: Any) -> Any:
    """Return a schema without descriptions and `x-kubernetes-` extensions."""
    if isinstance(value, dict):
        return {
            key: stripped(item)
            for key, item in value.items()
            if not (key == "description" and isinstance(item, str)) and not key.startswith("x-kubernetes")
        }
    return [stripped(item) for item in value] if isinstance(value, list) else value


def referred(value: Any) -> set[str]:
    """Return the names of the definitions that a schema refers to."""
    if isinstance(value, dict):
        here = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
        return here.union(*map(referred, value.values()))
    return set().union(*map(referred, value)) if isinstance(value, list) else set()


def main() -> None:
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("kubernetes-validate is not installed")
    folder = Path(package.submodule_search_locations[0]) / "kubernetes-json-schema" / f"{RELEASE}-local-strict"
    everything = json.loads((folder / "_definitions.json").read_text())
    definitions = everything["$defs"]
    wanted, kept = set(KINDS.values()), {}
    while wanted - kept.keys():
        for name in wanted - kept.keys():
            kept[name] = stripped(definitions[name])
            wanted = wanted | referred(kept[name])
    lines = [f"{json.dumps(name)}: {json.dumps(kept[name], sort_keys=True)}" for name in sorted(kept)]
    kinds = json.dumps({kind: {"$ref": f"#/$defs/{name}"} for kind, name in KINDS.items()}, indent=1)
    head = '{"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "kubernetes.json",\n'
    text = f'{head}"kinds": {kinds},\n"$defs": {{\n' + ",\n".join(lines) + "\n}}\n"
    (Path(__file__).parent / "kubernetes.json").write_text(text)


if __name__ == "__main__":
    main()
