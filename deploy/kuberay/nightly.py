"""Create a RayJob for a command, wait for its end, and exit as the command did.

Runs in a pod of a Kubernetes Job, which reads the exit code (cronjob.yaml, deploy/airflow/):

    python nightly.py tarsift ingest 's3://bucket/dump/{day}/' ...

`{day}` is the day before the one on which the Job was scheduled, in UTC, however late it is tried again. The RayJob
is rayjob.yaml beside this file with that command; it belongs to the Job, has its name, and goes when it goes.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

FAILED, USAGE, AGAIN = 1, 2, 75
POLL_S = 15.0
PATIENCE_S = 600.0  # for a Kubernetes that does not answer
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Api:
    """A few requests to Kubernetes, by the service account of the pod."""

    def __init__(self, url: str, namespace: str, account: Path = ACCOUNT) -> None:
        self.url, self.namespace, self.account = url, namespace, account

    def ask(self, group: str, name: str = "", *, method: str = "GET", body: Any = None) -> dict[str, Any] | None:
        """Return the answer to a request for `group` (`apis/ray.io/v1`, `rayjobs`); None if there is no such thing.

        Raises:
            OSError: where Kubernetes does not answer for PATIENCE_S, or refuses.
        """
        api, _, kind = group.rpartition("/")
        url = f"{self.url}/{api}/namespaces/{self.namespace}/{kind}/{name}".rstrip("/")
        token = (self.account / "token").read_text().strip()  # it is renewed now and then
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        authority = self.account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority)) if url.startswith("https") else None
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code in (404, 409):  # not there; there already
                    return None
                if (error.code != 429 and error.code < 500) or time.monotonic() > until:
                    raise
            except OSError:
                if time.monotonic() > until:
                    raise
            time.sleep(POLL_S)


RAYJOBS, JOBS = "apis/ray.io/v1/rayjobs", "apis/batch/v1/jobs"


def day_of(job: dict[str, Any]) -> str:
    """Return the day before the one on which a Job was scheduled, or created by hand."""
    metadata = job["metadata"]
    annotations = metadata.get("annotations") or {}
    told = annotations.get("batch.kubernetes.io/cronjob-scheduled-timestamp") or metadata["creationTimestamp"]
    scheduled = datetime.datetime.fromisoformat(told.replace("Z", "+00:00")).astimezone(datetime.UTC)
    return (scheduled.date() - datetime.timedelta(days=1)).isoformat()


def ray_job(template: dict[str, Any], command: list[str], name: str, uid: str) -> dict[str, Any]:
    """Return a RayJob with another command, tried once, that belongs to the Job of that name."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    metadata = {**template["metadata"], "name": name, "ownerReferences": [owner]}
    spec = {**template["spec"], "entrypoint": shlex.join(command), "backoffLimit": 0}
    return {**template, "metadata": metadata, "spec": spec}


def exit_code(found: dict[str, Any]) -> int | None:
    """Return what the command of a RayJob exited with, None while it runs; 75 if it was ended from outside.

    Ray reports a command that failed as "Job entrypoint command failed with exit code N, ..."; KubeRay hands it on.
    """
    status = found.get("status") or {}
    state = status.get("jobDeploymentStatus")
    if state == "Complete":
        return 0 if status.get("jobStatus") == "SUCCEEDED" else FAILED  # or stopped by hand: then nobody goes on
    if state == "ValidationFailed":
        return USAGE
    if state != "Failed":
        return None
    if status.get("reason") == "DeadlineExceeded":
        return FAILED
    told = re.search(r"failed with exit code (-?\d+)", status.get("message") or "")
    # Without a code, or with that of a signal, the head or its node was lost: what is committed is there.
    return int(told[1]) if told and int(told[1]) > 0 else AGAIN


def run(api: Api, template: dict[str, Any], command: list[str], name: str, uid: str) -> int:
    """Have a command run by a RayJob and return its exit code; one that is running already is waited for."""
    job = api.ask(JOBS, name)
    if job is None:
        return FAILED
    day = day_of(job)
    wanted = ray_job(template, [word.replace("{day}", day) for word in command], name, uid)
    found = api.ask(RAYJOBS, name)
    if found is not None and exit_code(found) not in (None, 0):  # of an earlier try
        api.ask(RAYJOBS, name, method="DELETE")
        while api.ask(RAYJOBS, name) is not None:
            time.sleep(POLL_S)
        found = None
    if found is None:
        print(f"RayJob {name}: {wanted['spec']['entrypoint']}", flush=True)  # noqa: T201
        api.ask(RAYJOBS, method="POST", body=wanted)
    while (found := api.ask(RAYJOBS, name)) is not None:
        if (code := exit_code(found)) is not None:
            status = found["status"]
            print(f"{status['jobDeploymentStatus']}, exit code {code}\n{status.get('message', '')}")  # noqa: T201
            return code
        time.sleep(POLL_S)
    print(f"RayJob {name} was deleted")  # noqa: T201
    return FAILED


def main() -> int:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    api = Api(url, (ACCOUNT / "namespace").read_text().strip())
    template = yaml.safe_load((Path(__file__).parent / "rayjob.yaml").read_text())
    try:
        return run(api, template, sys.argv[1:], os.environ["JOB_NAME"], os.environ["JOB_UID"])
    except urllib.error.HTTPError as error:
        print(f"Kubernetes refuses: {error.code} {error.read().decode(errors='replace')}")  # noqa: T201
        return FAILED
    except OSError as error:
        print(f"Kubernetes does not answer: {error}")  # noqa: T201
        return AGAIN


if __name__ == "__main__":
    sys.exit(main())
