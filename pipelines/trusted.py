"""A trusted reference (`--reference`): which files it is, by which encoder, and the sample of it that is used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import FetchRows, SmallestHashes
from tarsift.pipelines.folding import run_fold


@dataclass(frozen=True)
class TrustedReference:
    """Parquet files with embeddings of images that are known to be clean.

    Attributes:
        folder: where they lie; `names` are those of the files, without `.parquet`.
        digest: of their content, so that a reference that was refreshed in place is another one.
    """

    folder: str
    names: tuple[str, ...]
    digest: str

    @classmethod
    def find(cls, path: str, weights_sha256: str) -> TrustedReference:
        """Look at the files of `path`: an `embeddings/ROLE` folder of a trusted dump, or one file of it.

        Args:
            weights_sha256: of the encoder that embedded the dump; embeddings of two encoders cannot be compared.

        Raises:
            UsageError: if there is no such file, or one lacks a column or is by another encoder.
        """
        folder, _, file = path.rpartition("/") if path.endswith(".parquet") else (path, "", "")
        with storage.reachable(path):
            files = [file] if file else storage.list_files(path, ".parquet")
            if not files:
                raise UsageError(f"--reference {path}: no Parquet file there; give an embeddings/ folder of a dump.")
            digest = hashlib.sha256()
            for name in files:
                digest.update(_look_at(storage.join(folder or ".", name), path, weights_sha256))
        return cls(folder or ".", tuple(name.removesuffix(".parquet") for name in files), digest.hexdigest())

    def draw(self, count: int, key: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (r, d) float32 and ids (r,) uint64 of `count` distinct images, or of all there are.

        Raises:
            UsageError: if none is embedded.
        """
        hashes = run_fold(SmallestHashes(count, key=key), self.names, [self.folder])
        if not len(hashes):
            raise UsageError(f"--reference {self.folder} holds no embedded sample.")
        rows = run_fold(FetchRows(int(hashes[-1]), key=key), self.names, [self.folder])
        return rows["embeddings"], rows["ids"]


def _look_at(url: str, path: str, weights_sha256: str) -> bytes:
    """Check one file and return a digest of its content."""
    with storage.open_read(url) as raw:
        try:
            schema = pq.read_schema(raw)
        except pa.ArrowInvalid as error:
            raise UsageError(f"--reference {path}: {url} is no Parquet file: {error}") from None
        missing = [name for name in FetchRows(0, key=b"").columns if name not in schema.names]
        if missing:
            raise UsageError(f"--reference {path}: {url} lacks the columns {missing}; it has {schema.names}.")
        by = (schema.metadata or {}).get(b"tarsift.weights_sha256", weights_sha256.encode()).decode()
        if by != weights_sha256:
            raise UsageError(
                f"--reference {path}: {url} was embedded by another encoder (weights {by[:12]}) than this dump "
                f"({weights_sha256[:12]}): embed the trusted dump with `tarsift embed` and the same encoder, and give "
                "its embeddings/detect folder."
            )
        raw.seek(0)
        return hashlib.file_digest(raw, "sha256").digest()  # pyright: ignore[reportArgumentType]  # it has `readinto`
