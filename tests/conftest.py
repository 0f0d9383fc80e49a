"""One Ray session for all tests that need one, a small dump with every ordinary flaw, an encoder file."""

import hashlib
import io
import json
import os
import tarfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits depend on it; and pools spinning on shared cores cost much
os.environ["RAY_ADDRESS"] = "local"  # not what `ray start`, or a test of several nodes, runs here meanwhile

import numpy as np
import pytest
from PIL import Image

from tarsift.operators.retry import take_repeated

COLOURS = ("red", "green", "blue", "yellow", "grey")


@pytest.fixture(autouse=True)
def nothing_repeated_yet():
    """What one test's requests had to repeat is not told by the next."""
    take_repeated()


@pytest.fixture(scope="session")
def ray_session():
    ray = pytest.importorskip("ray")
    from tarsift.pipelines.session import session

    with session(num_cpus=2):
        yield ray


def picture(rng: np.random.Generator, size: int = 32) -> bytes:
    """A picture of low frequencies, as JPEG."""
    small = rng.integers(0, 255, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    return out.getvalue()


def write_shard(path, samples: list[dict[str, bytes]], *, first: int, mode: str = "w") -> None:
    """Write samples (extension -> bytes) as a WebDataset shard."""
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for i, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{first + i:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_dump(folder, *, shards: int = 5, samples: int = 80, flaws: bool = True, seed: int = 0) -> None:
    """Write shards of samples, one of them gzipped, with one bad image, one missing caption and copies in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for s in range(shards):
        rows = []
        for i in range(samples):
            caption = f"a photo of a {COLOURS[i % len(COLOURS)]} thing number {i % 7}".encode()
            rows.append({"jpg": picture(rng), "txt": caption})
        if flaws and s == 0:
            rows[3]["jpg"] = b"<html>404</html>"
            del rows[5]["txt"]
            rows[7]["jpg"] = rows[6]["jpg"]
        gz = s == shards - 1
        write_shard(folder / f"{s:05d}.tar{'.gz' if gz else ''}", rows, first=s * samples, mode="w:gz" if gz else "w")


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    make_dump(folder)
    return folder


@pytest.fixture(scope="module")
def joined():
    """The environment by which commands join a Ray that is there."""
    from tests.pipelines.runs import ray_head

    with ray_head() as environment:
        yield environment


@pytest.fixture(scope="session")
def cleaned(tmp_path_factory, ray_session):
    """A folder with `dump`, of 3 shards in two folders and with uids as DataComp has them, and `out`: its `clean`."""
    from tarsift.pipelines.clean import clean
    from tarsift.pipelines.config import load_config

    folder = tmp_path_factory.mktemp("cleaned")
    rng = np.random.default_rng(5)
    for s, name in enumerate(("a/00000.tar", "a/00001.tar.gz", "b/00002.tar")):
        rows = []
        for i in range(60):
            uid = hashlib.sha256(f"{s} {i}".encode()).hexdigest()[:32]
            caption = f'a "photo" of a {COLOURS[i % len(COLOURS)]} thing, number {i % 7}\n<script>'.encode()
            rows.append({"jpg": picture(rng), "txt": caption, "json": json.dumps({"uid": uid}).encode()})
        rows[2]["jpg"] = b"<html>404</html>"
        del rows[4]["txt"]
        (folder / "dump" / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(folder / "dump" / name, rows, first=60 * s, mode="w:gz" if name.endswith("gz") else "w")
    with tarfile.open(folder / "dump" / "b" / "00002.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        for extension, data in (("jpg", picture(rng)), ("txt", b"again")):
            member = tarfile.TarInfo(f"{120:09d}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    own = make_encoder(folder / "enc.pt", folder / "dump")
    small = [
        "suspicion.published_ks=[8]",
        "suspicion.reference_size=64",
        f"encoders.detect.spec={own}",
        "flag.value=0.1",
    ]
    clean(str(folder / "dump"), str(folder / "out"), config=load_config(settings=small))
    return folder


def make_encoder(path, dump=None, *, seed: int = 0) -> str:
    """Write a small encoder with random weights, said to be trained on a dump: enough for all but detection."""
    from tarsift.operators.models import build_model, model_config, save_checkpoint

    shards = {} if dump is None else {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in dump.rglob("*.tar*")}
    model = build_model("tiny", seed=seed)
    save_checkpoint(path, model, config=model_config("tiny"), shards=shards, steps=0, samples=0, seed=seed)
    return str(path)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, dump):
    return make_encoder(tmp_path_factory.mktemp("encoder") / "enc.pt", dump)


@pytest.fixture(scope="session")
def witness(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("witness") / "enc.pt", seed=1)
