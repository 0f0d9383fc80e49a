"""The nightly pod's script against a stand-in of Kubernetes: what it creates, waits for, and exits with."""

import importlib.util
import json
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest
import yaml

from tests.deploy.found import DEPLOY, documents, problems

COMMAND = ["tarsift", "clean", "s3://bucket/dump/{day}/{00000..00331}.tar", "--out", "s3://bucket/a b/{day}"]
TEMPLATE = yaml.safe_load((DEPLOY / "kuberay" / "rayjob.yaml").read_text())
JOB, RAYJOB = "/apis/batch/v1/namespaces/night/jobs/n-1", "/apis/ray.io/v1/namespaces/night/rayjobs/n-1"


def failed(code: int) -> dict:
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n"
    return {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "jobStatus": "FAILED", "message": message}


SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}


@pytest.fixture
def nightly(monkeypatch):
    spec = importlib.util.spec_from_file_location("nightly", DEPLOY / "kuberay" / "nightly.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    return module


@pytest.fixture
def kubernetes(tmp_path):
    """A stand-in that keeps what lies where; `statuses` are those that the RayJob has, one look after the other."""
    state = SimpleNamespace(there={}, asked=[], statuses=[], broken=[], refused=None)
    state.there[JOB] = {"metadata": {"name": "n-1", "creationTimestamp": "2026-03-01T02:00:07Z"}}

    class Answers(BaseHTTPRequestHandler):
        def do(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            state.asked.append((self.command, self.path, body, self.headers["Authorization"]))
            if state.broken or state.refused:
                return self.answer(state.broken.pop() if state.broken else state.refused, {})
            if self.command == "POST":
                path = f"{self.path}/{body['metadata']['name']}"
                if path in state.there:
                    return self.answer(409, {})
                state.there[path] = dict(body)
                return self.answer(201, body)
            found = state.there.get(self.path)
            if found is None:
                return self.answer(404, {})
            if self.command == "DELETE":
                del state.there[self.path]
            elif self.path == RAYJOB and state.statuses:
                found["status"] = state.statuses.pop(0)
                if found["status"] is None:
                    del state.there[self.path]
                    return self.answer(404, {})
            return self.answer(200, found)

        do_GET = do_POST = do_DELETE = do

        def answer(self, code, body):
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    (tmp_path / "token").write_text("of-the-pod\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url, state.account = f"http://127.0.0.1:{server.server_port}", tmp_path
    yield state
    server.shutdown()
    server.server_close()


def run(nightly, kubernetes) -> int:
    api = nightly.Api(kubernetes.url, "night", kubernetes.account)
    return nightly.run(api, TEMPLATE, COMMAND, "n-1", "uid-1")


def created(kubernetes) -> list[dict]:
    return [body for method, _, body, _ in kubernetes.asked if method == "POST"]


def test_it_creates_the_rayjob_of_the_night_and_waits(nightly, kubernetes):
    kubernetes.statuses = [None, {}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, SUCCEEDED]
    kubernetes.there[RAYJOB] = {"metadata": {}}  # gone when it is looked at
    assert run(nightly, kubernetes) == 0
    (made,) = created(kubernetes)
    assert problems({**made, "metadata": {"name": made["metadata"]["name"]}}) == []
    words = shlex.split(made["spec"]["entrypoint"])
    # Of the day before; braces that are not {day} stay as they are.
    assert words[2:] == ["s3://bucket/dump/2026-02-28/{00000..00331}.tar", "--out", "s3://bucket/a b/2026-02-28"]
    assert made["spec"]["backoffLimit"] == 0
    assert {**made["spec"], "entrypoint": "", "backoffLimit": 2} == {**TEMPLATE["spec"], "entrypoint": ""}
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "n-1", "uid": "uid-1"}
    ]
    assert kubernetes.statuses == []
    assert {authorization for *_, authorization in kubernetes.asked} == {"Bearer of-the-pod"}


def test_the_schedule_decides_the_day_however_late_it_is(nightly):
    metadata = {"creationTimestamp": "2026-03-02T00:30:00Z"}
    assert nightly.day_of({"metadata": metadata}) == "2026-03-01"
    metadata["annotations"] = {"batch.kubernetes.io/cronjob-scheduled-timestamp": "2026-03-01T02:00:00Z"}
    assert nightly.day_of({"metadata": metadata}) == "2026-02-28"
    metadata["annotations"] = {"batch.kubernetes.io/cronjob-scheduled-timestamp": "2026-03-02T01:00:00+02:00"}
    assert nightly.day_of({"metadata": metadata}) == "2026-02-28"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((failed(code), code) for code in (1, 2, 3, 75)),
        (failed(-9), 75),  # killed: by the system's memory killer, for instance
        ({"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed"}, 75),  # the head was lost
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": ""}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),  # by hand
        ({"jobDeploymentStatus": "ValidationFailed"}, 2),
        (None, 1),  # deleted
    ],
)
def test_it_exits_as_the_command_did(nightly, kubernetes, status, code):
    kubernetes.there[RAYJOB] = {"metadata": {}}
    kubernetes.statuses = [RUNNING, RUNNING, status]
    assert run(nightly, kubernetes) == code
    assert created(kubernetes) == []  # it was there, and is waited for


def test_the_message_is_the_one_that_ray_writes():
    """The exit code is read from Ray's own words; they may not change unnoticed."""
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.submodule_search_locations is not None
    job = Path(package.submodule_search_locations[0]) / "dashboard" / "modules" / "job" / "job_supervisor.py"
    text = " ".join(job.read_text().split()).replace('" "', "").replace('" f"', "")
    assert "Job entrypoint command failed with exit code {return_code}, last available logs" in text
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in text


def test_after_75_the_next_try_makes_a_new_one(nightly, kubernetes):
    kubernetes.there[RAYJOB] = {"metadata": {}, "status": failed(75)}
    kubernetes.statuses = [failed(75)]
    finished = threading.Timer(0.1, lambda: kubernetes.statuses.append(SUCCEEDED))
    finished.start()
    assert run(nightly, kubernetes) == 0
    finished.join()
    methods = [method for method, *_ in kubernetes.asked]
    assert methods.index("DELETE") < methods.index("POST")
    assert len(created(kubernetes)) == 1


def test_one_that_has_succeeded_is_not_done_again(nightly, kubernetes):
    kubernetes.there[RAYJOB] = {"metadata": {}, "status": SUCCEEDED}
    assert run(nightly, kubernetes) == 0
    assert created(kubernetes) == []


def test_a_kubernetes_that_is_away_for_a_moment_is_waited_for(nightly, kubernetes):
    kubernetes.broken = [503, 429, 500]
    kubernetes.statuses = [SUCCEEDED]
    kubernetes.there[RAYJOB] = {"metadata": {}}
    assert run(nightly, kubernetes) == 0


def test_one_that_stays_away_or_refuses_ends_it(nightly, kubernetes, monkeypatch, tmp_path, capsys):
    (tmp_path / "namespace").write_text("night")
    monkeypatch.setattr(nightly, "ACCOUNT", tmp_path)
    for name, value in {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "9", "JOB_NAME": "n-1",
                        "JOB_UID": "u"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    api = nightly.Api
    monkeypatch.setattr(nightly, "Api", lambda url, namespace, *_: api(kubernetes.url, namespace, tmp_path))
    kubernetes.refused = 403
    assert nightly.main() == 1
    assert "refuses: 403" in capsys.readouterr().out
    with pytest.raises(HTTPError):
        run(nightly, kubernetes)
    monkeypatch.setattr(nightly, "Api", lambda url, namespace, *_: api("http://127.0.0.1:9", namespace, tmp_path))
    assert nightly.main() == 75
    assert "does not answer" in capsys.readouterr().out


def test_its_role_is_what_it_asks_for(nightly, kubernetes):
    """It is allowed what it does, and nothing else."""
    kubernetes.there[RAYJOB] = {"metadata": {}, "status": failed(75)}
    kubernetes.statuses = [failed(75)]
    threading.Timer(0.1, lambda: kubernetes.statuses.append(SUCCEEDED)).start()
    run(nightly, kubernetes)
    verbs = {"GET": "get", "POST": "create", "DELETE": "delete"}
    used = {(path.split("/")[2], path.split("/")[6], verbs[method]) for method, path, *_ in kubernetes.asked}
    (role,) = [one for one in documents("kuberay/rbac.yaml") if one["kind"] == "Role"]
    allowed = {(group, resource, verb) for rule in role["rules"] for group in rule["apiGroups"]
               for resource in rule["resources"] for verb in rule["verbs"]}  # fmt: skip
    assert used == allowed
