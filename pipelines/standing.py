"""The standing reference of `tarsift ingest`: a sample of all nights so far, on which the next one's rules are fitted.

It is no trusted reference: its rows are a random sample of the nights before, poison included, drawn by the hash
that draws tonight's. The smallest hashes of both together are those of one run over all shards, row for row.

    FOLDER/about.json             weights by role, which rules are kept
    FOLDER/<role>/rows.parquet    a row per image, in the same order for every role, ascending by hash
    FOLDER/density/rows.parquet   their density, where the rules are kept
    FOLDER/rules/*.npz            rules that may serve again, while encoders and settings are the same
    FOLDER/pictures/*.tar         the samples themselves, where encoders change: to embed them anew and to train on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.sides import Sides
from tarsift.operators.stored import Stored
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.ledger import fingerprint

STANDING = "rows"  # what the one file of each of its folders is called
ABOUT = "about.json"
DENSITY = "density"
PICTURES = "pictures"
RULES = ("density", "mismatch")


@dataclass(frozen=True)
class StandingReference:
    """A standing reference as it was found.

    Attributes:
        rows: how many images it has.
        weights: SHA-256 of the weights that embedded them, by role.
        digest: of its content.
        rules: fingerprint of the settings that its rules were fitted with (`rules_print`); None: it has none.
        pictures: folder of shards with the samples themselves; None: there are none.
    """

    folder: str
    rows: int
    weights: Mapping[str, str] = field(hash=False)
    digest: str
    rules: str | None
    pictures: str | None

    @classmethod
    def find(cls, folder: str, weights: Mapping[str, str] | None = None) -> StandingReference:
        """Look at what is there.

        Args:
            weights: of tonight's encoders by role; embeddings of others cannot be compared with theirs.

        Raises:
            UsageError: if there is none, it lacks a role, or other encoders made it.
        """
        with storage.reachable(folder):
            try:
                stored = storage.read_bytes(storage.join(folder, ABOUT))
                about = json.loads(stored)
            except (FileNotFoundError, ValueError):
                raise UsageError(f"{folder} is no standing reference: `tarsift ingest` makes them.") from None
        for role, digest in (weights or {}).items():
            by = about["weights"].get(role)
            if by != digest:
                raise UsageError(
                    f"{folder} was embedded by {'no ' + role if by is None else by[:12]}, this dump by {digest[:12]} "
                    f"({role}): their embeddings cannot be compared."
                )
        digest = hashlib.sha256(stored).hexdigest()
        pictures = storage.join(folder, PICTURES) if about["pictures"] == PICTURES else about["pictures"]
        return cls(folder, about["rows"], about["weights"], digest, about["rules"], pictures)

    def stored(self, role: str, *columns: str, prefix: str = "") -> Stored:
        """Rows as a role's encoder has embedded them; all columns where none is named."""
        wanted = ("shard", "row", *columns) if columns else None
        return Stored(storage.join(self.folder, role), wanted, prefix, drawn=True)

    def keeps_rules(self, config: CleanConfig, sides: Sides) -> bool:
        """Tell whether its rules can serve in place of new ones: they were fitted with these settings and encoders."""
        wanted = config.reference.rules == "keep"
        return wanted and self.rules is not None and self.rules == rules_print(config, sides, self.weights)

    def rule(self, name: str) -> str:
        """Return where a rule is."""
        return storage.join(self.rules_folder, f"{name}.npz")

    @property
    def rules_folder(self) -> str:
        return storage.join(self.folder, "rules")

    def read(self, role: str) -> pa.Table:
        """Return its rows as a role's encoder has embedded them, or those of `DENSITY`."""
        with storage.open_read(storage.join(self.folder, role, f"{STANDING}.parquet")) as raw:
            return pq.read_table(raw)


def rules_print(config: CleanConfig, sides: Sides, weights: Mapping[str, str]) -> str:
    """Digest of what fitted rules depend on, apart from the samples."""
    settings = config.result_settings()
    reference = {**settings["reference"], "standing": None, "rules": None}
    roles = {role: weights.get(role) for role in (sides.density, sides.captions) if role}
    return fingerprint("rules", settings["suspicion"], settings["mismatch"], reference, sides.to_json(), roles)


def write_standing(
    folder: str,
    rows: Mapping[str, pa.Table],
    *,
    weights: Mapping[str, str],
    density: pa.Table | None = None,
    rules: tuple[str, str] | None = None,
    pictures: str | None = None,
    **about: Any,
) -> StandingReference:
    """Write a standing reference; `about.json` is put last, and without it there is none.

    Args:
        rows: by role, in the same order.
        density: shard, row and density of the same rows; needed with `rules`.
        rules: their fingerprint, and the folder that they are copied from.
        pictures: folder with the samples themselves; `PICTURES`: the one of this name below `folder`.
        about: what else it says of itself.
    """
    digest = hashlib.sha256()

    def put(url: str, data: bytes | pa.Buffer) -> None:
        digest.update(data)
        storage.put_bytes(url, data)

    for name, table in {**rows, **({} if density is None else {DENSITY: density})}.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        put(storage.join(folder, name, f"{STANDING}.parquet"), sink.getvalue())
    print_, source = rules or (None, None)
    for name in RULES:
        if source is not None and storage.exists(file := storage.join(source, f"{name}.npz")):
            put(storage.join(folder, "rules", f"{name}.npz"), storage.read_bytes(file))
    content = {
        "rows": len(next(iter(rows.values()))),
        "weights": dict(weights),
        "rules": print_,
        "pictures": pictures,
        "content": digest.hexdigest(),
        **about,
    }
    storage.put_bytes(storage.join(folder, ABOUT), json.dumps(content, indent=1).encode())
    return StandingReference.find(folder)
