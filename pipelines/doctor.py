"""What works on this machine and what does not: packages, GPU, faiss, Ray, disk, and access to storage."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.pipelines.text import size

FREE_BYTES = 10 << 30  # of the folder where Ray spills what does not fit into memory
SHARED_BYTES = 2 << 30  # of /dev/shm, where Ray keeps what is on its way from stage to stage
OK, WARNING, BROKEN = "ok", "warning", "broken"


class Finding(BaseModel):
    """One thing that was looked at: `ok`, `warning` (works, but) or `broken`, and what to do."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: str
    detail: str
    remedy: str = ""


def examine(urls: Sequence[str] = ()) -> list[Finding]:
    """Look at everything that a run needs; `urls` are dumps and result folders to reach.

    Example:
        >>> [f.name for f in examine(["s3://bucket/cc3m/"]) if f.state == "broken"]  # doctest: +SKIP
        []
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _packages, _import_names, _torch, _faiss, _ray, _space, _threads,
    ]  # fmt: skip
    found = [finding for check in checks for finding in _guarded(check)]
    return found + [finding for url in urls for finding in _guarded(lambda url=url: _reach(url))]


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # whatever a broken installation raises is what is to be told
        name = check.__name__.strip("_").replace("_", " ")
        return [Finding(name=name, state=BROKEN, detail=f"{type(error).__name__}: {error}")]


def _python() -> Iterator[Finding]:
    yield Finding(name="python", state=OK, detail=f"{sys.version.split()[0]} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    """Compare installed versions with those that tarsift asks for."""
    for text in requires("tarsift") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(
                name=requirement.name, state=BROKEN, detail="not installed", remedy=f"pip install '{requirement}'"
            )
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                name=requirement.name,
                state=BROKEN,
                detail=f"{found} is installed, {requirement.specifier} is needed",
                remedy=f"pip install '{requirement}'",
            )
    yield Finding(name="tarsift", state=OK, detail=version("tarsift"))


def _import_names() -> Iterator[Finding]:
    """Tell whether something else stands in the way of a package's name."""
    home = Path(str(importlib.import_module("tarsift").__file__)).parent
    for name in ("tarsift", "ray", "torch", "webdataset", "faiss"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin and origin.is_relative_to(Path.cwd()) and home.parent != Path.cwd() and ".venv" not in origin.parts:
            yield Finding(
                name="import names",
                state=WARNING,
                detail=f"`import {name}` finds {origin}",
                remedy="run from another folder, or rename what lies there",
            )
    yield Finding(name="import names", state=OK, detail=f"tarsift is {home}")


def _torch() -> Iterator[Finding]:
    import torch
    import torchvision  # broken where it was built for another torch

    detail = f"{torch.__version__}, torchvision {torchvision.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding(name="torch", state=OK, detail=f"{detail}, GPUs: {', '.join(names)}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            name="torch",
            state=WARNING,
            detail=f"{detail}: there is an NVIDIA driver, but torch {torch.version.cuda or 'without CUDA'} sees no GPU",
            remedy="install a torch built for the CUDA version that nvidia-smi shows",
        )
    else:
        yield Finding(name="torch", state=OK, detail=f"{detail}, no GPU")


def _faiss() -> Iterator[Finding]:
    builds = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            builds.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(builds) > 1:
        remedy = "uninstall both, then install one: they overwrite each other's files"
        yield Finding(name="faiss", state=BROKEN, detail=" and ".join(builds), remedy=remedy)
    elif not builds:
        remedy = "pip install 'tarsift[cpu]' or 'tarsift[gpu]' for faiss"
        yield Finding(name="faiss", state=WARNING, detail="not installed; torch searches instead", remedy=remedy)
    else:
        gpus = getattr(importlib.import_module("faiss"), "get_num_gpus", lambda: 0)()
        yield Finding(name="faiss", state=OK, detail=f"{builds[0]}, {gpus} GPUs")


def _ray() -> Iterator[Finding]:
    """Tell which Ray a run would use; joins the cluster of RAY_ADDRESS, which refuses other versions."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding(name="ray", state=OK, detail=f"{ray.__version__}, a local one per run (RAY_ADDRESS is not set)")
        return
    from tarsift.pipelines.session import session

    with session():
        nodes = [node for node in ray.nodes() if node["Alive"]]
        resources = ray.cluster_resources()
        python = ray.get(ray.remote(num_cpus=0)(_python_version).remote())
    detail = f"{ray.__version__} at {address}: {len(nodes)} nodes, {resources.get('CPU', 0):g} CPUs"
    detail += f", {resources.get('GPU', 0):g} GPUs"
    if python != _python_version():
        remedy = "use one Python version on driver and workers"
        detail += f"; Python {python} there, {_python_version()} here"
        yield Finding(name="ray", state=BROKEN, detail=detail, remedy=remedy)
    else:
        yield Finding(name="ray", state=OK, detail=detail)


def _python_version() -> str:
    return sys.version.split()[0]


def _space() -> Iterator[Finding]:
    places = [(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), FREE_BYTES, "Ray spills there")]
    if os.path.isdir("/dev/shm"):
        places.append(("/dev/shm", SHARED_BYTES, "Ray keeps its object store there; in a container give --shm-size"))
    for folder, wanted, what in places:
        free = shutil.disk_usage(folder).free
        state = OK if free >= wanted else WARNING
        remedy = "" if state == OK else f"{what}; {size(wanted)} or more are better"
        yield Finding(name="space", state=state, detail=f"{size(free)} free in {folder}", remedy=remedy)


def _threads() -> Iterator[Finding]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(name="cpus", state=OK, detail=f"{cpus} of {os.cpu_count()}")


def _reach(url: str) -> Iterator[Finding]:
    """List a place, and say what is wrong with it or with the credentials."""
    try:
        fs, path = storage.filesystem(url)
        names = fs.ls(path, detail=False)[:1] if fs.isdir(path) else [path] if fs.exists(path) else None
    except UsageError as error:
        yield Finding(name=url, state=BROKEN, detail=str(error))
        return
    except Exception as error:  # drivers raise errors of their own
        remedy = "check credentials, region and endpoint (AWS_*, FSSPEC_S3_*, GOOGLE_APPLICATION_CREDENTIALS)"
        yield Finding(name=url, state=BROKEN, detail=f"{type(error).__name__}: {error}", remedy=remedy)
        return
    if names is None:
        yield Finding(name=url, state=WARNING, detail="nothing is there (yet)")
    else:
        yield Finding(name=url, state=OK, detail="can be listed" if names else "can be listed, and is empty")
