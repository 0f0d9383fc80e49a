"""What works on this machine and what does not: packages, GPU, faiss, Ray, disk, and access to storage."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

from packaging.requirements import Requirement
from pydantic import AfterValidator, BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.listing import SUFFIXES
from tarsift.operators.retry import first_contact
from tarsift.pipelines.installed import providers, shadows
from tarsift.pipelines.text import count, size

FREE_BYTES = 10 << 30  # of the folder where Ray spills what does not fit into memory, and of result folders
SHARED_BYTES = 2 << 30  # of /dev/shm, where Ray keeps what is on its way from stage to stage
ANSWER_S = 30.0  # for a node of the cluster; one that is well answers in a second or two
OK, WARNING, BROKEN = "ok", "warning", "broken"

Told = Annotated[str, AfterValidator(storage.without_secrets)]


class Finding(BaseModel):
    """One thing that was looked at: `ok`, `warning` (works, but) or `broken`, and what to do."""

    model_config = ConfigDict(frozen=True)

    name: Told
    state: str
    detail: Told
    remedy: str = ""


def examine(urls: Sequence[str] = (), *, write: bool = False) -> list[Finding]:
    """Look at everything that a run needs.

    Args:
        urls: dumps and result folders to reach.
        write: also write a tiny file to each of them, and remove it.

    Example:
        >>> [f.name for f in examine(["s3://bucket/cc3m/"]) if f.state == "broken"]  # doctest: +SKIP
        []
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _packages, _import_names, _torch, _faiss, _ray, _space, _threads,
    ]  # fmt: skip
    found = [finding for check in checks for finding in _guarded(check)]
    return found + places(urls, write=write)


def places(urls: Sequence[str], *, write: bool = False) -> list[Finding]:
    """Look at the places that `examine` is asked to look at: can they be listed and written to, is there room?"""
    looks: list[Callable[[str], Iterator[Finding]]] = [_reach, _room, *([_write] if write else [])]
    return [found for url in urls for look in looks for found in _guarded(partial(look, url), name=url)]


def _guarded(check: Callable[[], Iterator[Finding]], name: str = "") -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # whatever a broken installation raises is what is to be told
        name = name or check.__name__.strip("_").replace("_", " ")
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
    """Tell whether a file or folder of somebody's own stands in the way of a package's name."""
    for name, origin in shadows():
        yield Finding(
            name="import names",
            state=WARNING,
            detail=f"`import {name}` finds {origin}, not what is installed",
            remedy="rename it, run from another folder, or take its folder out of PYTHONPATH",
        )
    home = Path(str(importlib.import_module("tarsift").__file__)).parent
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
    builds = [f"{name} {number}" for name, number in providers("faiss").items()]
    if len(builds) > 1:
        remedy = "uninstall all of them, then install one: they overwrite each other's files"
        yield Finding(name="faiss", state=BROKEN, detail=" and ".join(builds), remedy=remedy)
    elif not builds:
        remedy = "pip install 'tarsift[cpu]' or 'tarsift[gpu]' for faiss"
        yield Finding(name="faiss", state=WARNING, detail="not installed; torch searches instead", remedy=remedy)
    else:
        gpus = getattr(importlib.import_module("faiss"), "get_num_gpus", lambda: 0)()
        yield Finding(name="faiss", state=OK, detail=f"{builds[0]}, {gpus} GPUs")


def _ray() -> Iterator[Finding]:
    """Tell which Ray a run would use; joins one that is there and asks each of its nodes."""
    import ray

    from tarsift.pipelines.session import known_address, session

    address = known_address()
    if not address:
        yield Finding(name="ray", state=OK, detail=f"{ray.__version__}, a local one per run (none is running)")
        return
    with session():
        resources = ray.cluster_resources()
        told = _ask_nodes()
    detail = f"{ray.__version__} at {address}: {count(len(told), 'node')}, {resources.get('CPU', 0):g} CPUs"
    yield Finding(name="ray", state=OK, detail=f"{detail}, {resources.get('GPU', 0):g} GPUs")
    yield from _compare_nodes(told, _version_teller()())


def _version_teller() -> Callable[[], dict[str, str]]:
    """Return a function that tells what must be the same on all machines of a cluster.

    As an inner function it is sent to a node as code, not as a name to be imported: tarsift may be missing there.
    """

    def tell() -> dict[str, str]:
        import sys
        from importlib.metadata import PackageNotFoundError, version

        found = {"Python": ".".join(map(str, sys.version_info[:2]))}
        for name in ("ray", "tarsift"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return found

    return tell


def _ask_nodes() -> list[tuple[str, dict[str, str] | str]]:
    """Return every node of the cluster with its versions, or with why it did not tell them."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_version_teller())
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append((node["NodeManagerAddress"], task.options(scheduling_strategy=there).remote()))
    answered, _ = ray.wait([ref for _, ref in asked], num_returns=len(asked), timeout=ANSWER_S)
    told: list[tuple[str, dict[str, str] | str]] = []
    for node, ref in asked:
        try:
            told.append((node, ray.get(ref) if ref in answered else f"no answer within {ANSWER_S:g} s"))
        except RayError as error:
            told.append((node, f"cannot run a task ({type(error).__name__})"))
    return told


def _compare_nodes(told: Sequence[tuple[str, Mapping[str, str] | str]], here: Mapping[str, str]) -> Iterator[Finding]:
    """Name the nodes that run nothing or have other versions than this machine, those of one kind together."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, versions in told:
        if isinstance(versions, str):
            alike[versions, "look at the logs of that node's raylet, or take it out of the cluster"].append(node)
            continue
        other = [f"{name} {versions[name]} (here {mine})" for name, mine in here.items() if versions[name] != mine]
        if other:
            remedy = "install the same everywhere: one Python, and tarsift from one checkout with -c constraints.txt"
            alike[", ".join(other), remedy].append(node)
    for (what, remedy), nodes in alike.items():
        which = ", ".join(nodes[:5]) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")
        yield Finding(name="ray nodes", state=BROKEN, detail=f"{which}: {what}", remedy=remedy)


def _space() -> Iterator[Finding]:
    places = [(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), FREE_BYTES, "Ray spills there")]
    if os.path.isdir("/dev/shm"):
        places.append(("/dev/shm", SHARED_BYTES, "Ray keeps its object store there; in a container give --shm-size"))
    for folder, wanted, what in places:
        yield _free(folder, wanted, what)


def _free(folder: str, wanted: int, what: str) -> Finding:
    free = shutil.disk_usage(folder).free
    state = OK if free >= wanted else WARNING
    remedy = "" if state == OK else f"{what}; {size(wanted)} or more are better"
    return Finding(name="space", state=state, detail=f"{size(free)} free in {folder}", remedy=remedy)


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


def _room(url: str) -> Iterator[Finding]:
    """Tell how much room there is in a local folder, or where it would be made."""
    if storage.is_local(url):
        yield _free(_nearest_folder(url), FREE_BYTES, "a result folder takes as much as its dump, and more")


def _write(url: str) -> Iterator[Finding]:
    """Write a tiny file, read it and remove it; makes no folder."""
    if url.lower().endswith(SUFFIXES) or set(url) & set("*?[{"):
        yield Finding(name=url, state=WARNING, detail="names shards: not written to", remedy="give a folder to --write")
        return
    folder = _nearest_folder(url) if storage.is_local(url) else url
    probe, data = storage.join(folder, f"tarsift-doctor-{secrets.token_hex(8)}"), secrets.token_bytes(8)
    try:
        with first_contact():
            storage.put_bytes(probe, data)
            same = storage.read_bytes(probe) == data
            storage.remove(probe)
    except Exception as error:  # drivers raise errors of their own
        remedy = "check the permissions to put, get and delete; a dump need not be writable, a result folder must"
        detail = f"cannot be written: {type(error).__name__}: {error}"
        yield Finding(name=url, state=BROKEN, detail=detail, remedy=remedy)
        return
    detail = "can be written" if same else "what was written reads back as something else"
    yield Finding(name=url, state=OK if same else BROKEN, detail=f"{detail} (a tiny file in {folder}, removed again)")


def _nearest_folder(url: str) -> str:
    """Return the folder of a local path, or the nearest one above it that exists."""
    path = Path(storage.filesystem(url)[1])
    return str(next(folder for folder in (path, *path.parents) if folder.is_dir()))
