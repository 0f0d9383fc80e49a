"""What Airflow makes of the DAG, as JSON: run by the Python of an environment with Airflow, not by pytest's."""

import importlib.util
import json
import sys
from types import SimpleNamespace

from kubernetes.client import ApiClient


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("dag_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (task,) = module.dag.tasks
    run = SimpleNamespace(run_id="scheduled", run_type="scheduled", logical_date=None, start_date=None)
    of = {"dag_id": module.dag.dag_id, "task_id": task.task_id, "run_id": "scheduled"}
    instance = SimpleNamespace(**of, try_number=1, map_index=-1)
    context = {"ds": "2026-03-01", "dag": module.dag, "ti": instance, "task_instance": instance, "dag_run": run, **of}
    task.render_template_fields(context)
    job = task.build_job_request_obj(context)
    told = {
        "max_active_runs": task.dag.max_active_runs,
        "catchup": task.dag.catchup,
        "retries": task.retries,
        "waits": task.wait_until_job_complete,
        "timetable": type(task.dag.timetable).__name__,
        "job": ApiClient().sanitize_for_serialization(job),
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
