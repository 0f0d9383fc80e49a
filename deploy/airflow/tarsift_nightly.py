"""Each night a RayJob on Kubernetes, by way of Airflow 3 and its provider cncf.kubernetes.

The task is a Kubernetes Job like that of deploy/kuberay/cronjob.yaml: a pod that creates the RayJob, waits for it and
exits as the command did. Kubernetes itself tries exit code 75 again and nothing else, which retries of Airflow cannot
do. What `kubectl apply -k deploy/kuberay` makes must be there; delete or suspend its CronJob.
"""

from datetime import datetime, timedelta

from airflow.providers.cncf.kubernetes.operators.job import KubernetesJobOperator
from airflow.sdk import DAG, CronDataIntervalTimetable
from kubernetes.client import models as k8s

NAMESPACE = "tarsift"
IMAGE = "registry.example/tarsift:cpu"

# The command. A run at two in the morning has the day before as its `ds`.
COMMAND = [
    "tarsift", "ingest", "s3://bucket/dump/{{ ds }}/", "--root", "s3://bucket/dump/",
    "--state", "s3://bucket/tarsift",
    "--encoder", "detect=RN50:s3://bucket/cc3m.pt",
    "--encoder", "witness=ViT-B-32:s3://bucket/laion2b.pt",
    "--fail-on-findings",
    "--workers", "4", "--gpus-per-worker", "1",
    "--set", "resources.stall_timeout_s=1800",
]  # fmt: skip


class WaitedJob(KubernetesJobOperator):
    """A Job that is waited for. It is asked for no pods: right after the Job was created there are none yet."""

    def get_pods(self, *args, **kwargs) -> list[k8s.V1Pod]:
        return []


AGAIN = [75, 137, 143]  # interrupted; or the waiting pod was killed, and the next one finds the RayJob


def rule(action: str, operator: str) -> k8s.V1PodFailurePolicyRule:
    codes = k8s.V1PodFailurePolicyOnExitCodesRequirement(operator=operator, values=AGAIN)
    return k8s.V1PodFailurePolicyRule(action=action, on_exit_codes=codes)


evicted = k8s.V1PodFailurePolicyRule(
    action="Ignore", on_pod_conditions=[k8s.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget")]
)
policy = k8s.V1PodFailurePolicy(rules=[evicted, rule("Count", "In"), rule("FailJob", "NotIn")])


def label(name: str, of: str) -> k8s.V1EnvVar:
    field = k8s.V1ObjectFieldSelector(field_path=f"metadata.labels['batch.kubernetes.io/{of}']")
    return k8s.V1EnvVar(name=name, value_from=k8s.V1EnvVarSource(field_ref=field))


with DAG(
    dag_id="tarsift_nightly",
    schedule=CronDataIntervalTimetable("0 2 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["tarsift"],
) as dag:
    WaitedJob(
        task_id="ingest",
        name="tarsift-ingest",
        namespace=NAMESPACE,
        image=IMAGE,
        cmds=["tini", "--", "python", "/nightly/nightly.py"],
        arguments=COMMAND,
        env_vars=[label("JOB_NAME", "job-name"), label("JOB_UID", "controller-uid")],
        service_account_name="tarsift-nightly",
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True, run_as_user=1000, seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault")
        ),
        container_security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False, capabilities=k8s.V1Capabilities(drop=["ALL"])
        ),
        volumes=[k8s.V1Volume(name="nightly", config_map=k8s.V1ConfigMapVolumeSource(name="tarsift-nightly"))],
        volume_mounts=[k8s.V1VolumeMount(name="nightly", mount_path="/nightly")],
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": "50m", "memory": "64Mi"}, limits={"memory": "128Mi"}
        ),
        full_job_spec=k8s.V1Job(spec=k8s.V1JobSpec(pod_failure_policy=policy, template=k8s.V1PodTemplateSpec())),
        backoff_limit=5,
        ttl_seconds_after_finished=7 * 24 * 3600,
        wait_until_job_complete=True,
        get_logs=False,  # of several pods in turn; they say little, the RayJob's head has the log
        retries=0,
        execution_timeout=timedelta(hours=20),
    )
