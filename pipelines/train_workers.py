"""A training on workers of Ray's: it can be asked to stop, and workers that die are replaced.

One worker is a task, in a process that keeps torch and open_clip loaded for the next training or encoder. Several are a
Ray Train worker group, whose own processes cost as much as loading those again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow.fs
import ray
from ray.exceptions import RayError, RayTaskError

from tarsift.operators import storage
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.pipelines.encoding import ENCODERS, environment_of
from tarsift.pipelines.session import TASK_RETRIES
from tarsift.pipelines.stopping import patient
from tarsift.pipelines.tasks import leave

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Fit = Callable[[], Any]
End = Callable[[], None]


class Work(Protocol):
    """What every worker does; `asked` tells whether to stop, to worker 0 alone. What that one returns is the result."""

    def __call__(
        self, *, rank: int, device: torch.device, wrap: Callable[[Any], Any], asked: Callable[[], bool]
    ) -> Any: ...


def patiently(work: Callable[[Callable[[], bool]], T]) -> T:
    """Do work that is told of a request to stop, and stops by raising; what is done by then counts as done.

    Raises:
        KeyboardInterrupt: at a second request, or if the work raises it.
    """
    done: list[T] = []
    try:
        with patient() as asked:
            done.append(work(asked))
    except KeyboardInterrupt:
        if not done:
            raise
    return done[0]


def run_workers(work: Work, *, out: str, workers: int, cpus: float, gpus: float | None) -> Any:
    """Run `work` in so many workers and return what worker 0 returns.

    All are started again when one dies, a few times. When this program is asked to stop, worker 0 is told.

    Args:
        out: where the result goes; the record of a worker group lies beside it meanwhile, since all see that place.
        cpus, gpus: of each worker; None = a GPU where there are enough.

    Raises:
        UsageError: if there are to be several workers and Ray Train is not installed.
        KeyboardInterrupt: if it was asked to stop before work had begun.
    """
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= workers else 0.0
    bell = ray.remote(num_cpus=0)(_Bell).remote()
    stored = ray.put(work)  # or Ray Train's own processes would load all that it needs
    if workers == 1:
        fit, end = _one_worker(stored, bell, cpus=cpus, gpus=gpus)
    else:
        fit, end = _worker_group(stored, bell, out=out, workers=workers, cpus=cpus, gpus=gpus)

    def attempts(asked: Callable[[], bool]) -> Any:
        for left in reversed(range(TASK_RETRIES + 1)):
            try:
                return _until_rung(fit, bell, asked)
            except Exception as error:
                cause = _cause(error)
                if asked() and not isinstance(cause, TarsiftError):
                    raise KeyboardInterrupt from error
                if not left or not _of_a_death(cause, workers):
                    raise cause from error
        raise AssertionError

    try:
        return patiently(attempts)
    finally:
        end()


def _one_worker(stored: ray.ObjectRef, bell: Any, *, cpus: float, gpus: float) -> tuple[Fit, End]:
    """Return what trains in a task, and what sees to it that none trains on, or begins."""
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "runtime_env": environment_of(ENCODERS)}
    tasks: list[ray.ObjectRef] = []

    def fit() -> Any:
        tasks.append(ray.remote(_train_alone).options(**options).remote(stored, bell))
        return ray.get(tasks[-1])

    return fit, lambda: leave(tasks)


def _worker_group(
    stored: ray.ObjectRef, bell: Any, *, out: str, workers: int, cpus: float, gpus: float
) -> tuple[Fit, End]:
    """Return what trains in a Ray Train worker group, and what removes the record of that."""
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UsageError(f"several workers need Ray Train: pip install 'tarsift[train]' ({error}).") from error
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    fs, path = storage.filesystem(out)
    filesystem = None if storage.is_local(out) else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))

    def end() -> None:
        storage.remove_tree(f"{out}.train")

    def fit() -> Any:
        end()  # of a run that was killed; Ray Train would go on with it
        trainer = TorchTrainer(
            _train_in_group,
            train_loop_config={"work": stored, "bell": bell},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources),
            run_config=RunConfig(
                name="run",
                storage_path=f"{path}.train",
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        return trainer.fit().return_value

    return fit, end


class _Bell:
    """Tells a worker, on whatever machine, that its driver was asked to stop; an actor."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._heard = False

    async def hear(self) -> None:
        """Return when it rings."""
        self._heard = True
        await self._rung.wait()

    async def ring(self) -> bool:
        """Ring, and tell whether anybody hears it."""
        self._rung.set()
        return self._heard


def _until_rung(fit: Callable[[], T], bell: Any, asked: Callable[[], bool]) -> T:
    """Call `fit` in a thread of its own: in the main thread it would take Ctrl-C for itself and kill the workers."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(fit())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="tarsift-train", daemon=True)
    thread.start()
    rung = False
    while thread.is_alive():
        thread.join(0.2)
        if asked() and not rung:
            rung = True
            if not ray.get(bell.ring.remote()):
                raise KeyboardInterrupt  # there are no workers yet, as where a cluster has no room for them
    return future.result()


def _train_alone(work: Work, bell: Any) -> Any:
    import torch

    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    return work(rank=0, device=device, wrap=lambda towers: towers, asked=_hearing(bell))


def _train_in_group(settings: dict[str, Any]) -> Any:
    from ray.train import get_context
    from ray.train.torch import get_device, prepare_model

    rank = get_context().get_world_rank()
    work: Work = ray.get(settings["work"])
    return work(
        rank=rank,
        device=get_device(),
        wrap=lambda towers: prepare_model(towers, move_to_device=False),
        asked=(lambda: False) if rank else _hearing(settings["bell"]),
    )


def _hearing(bell: Any) -> Callable[[], bool]:
    """Begin to listen; return what tells whether it has rung."""
    rung = [bell.hear.remote()]
    return lambda: bool(ray.wait(rung, timeout=0)[0])


def _cause(error: Exception) -> Exception:
    """Return what is behind an error of Ray's: an error of tarsift's, else one of Ray's own, else the first."""
    if isinstance(error, RayTaskError):
        return error.cause
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures.values()]
    return next((c for kind in (TarsiftError, RayError, Exception) for c in causes if isinstance(c, kind)), error)


def _of_a_death(cause: Exception, workers: int) -> bool:
    """Tell whether a worker died; with several, the others may say first that they lost touch with it."""
    return isinstance(cause, RayError) or (workers > 1 and isinstance(cause, RuntimeError))
