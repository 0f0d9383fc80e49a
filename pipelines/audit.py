"""Is a dump whole? Looks at every byte of it before an encoder, or a GPU, is paid for."""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from tarsift.operators import storage
from tarsift.operators.audit import EXAMPLES, PROBLEMS, AuditShard, Findings, Problem, ShardAudit, shared_uids
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.retry import take_repeated
from tarsift.operators.shards import ReadConfig, Shard, list_shards
from tarsift.pipelines.metrics import reported
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.printing import verdict_of_audit
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import STALL_TIMEOUT_S, session
from tarsift.pipelines.tasks import side_by_side

UIDS_PER_PART = 4_000_000  # uids compared at once: some 250 MB of a worker's memory


class Audit(BaseModel):
    """What there is to say of a dump.

    Attributes:
        decoded: whether images were decoded; without it a damaged image is not noticed.
        repeated_requests: requests to the store that were tried again, with success.
    """

    model_config = ConfigDict(frozen=True)

    shards: tuple[ShardAudit, ...]
    decoded: bool
    elapsed_s: float
    repeated_requests: int = 0

    @property
    def whole(self) -> bool:
        return all(shard.whole for shard in self.shards)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def problems(self) -> dict[str, int]:
        """How often each problem was found, the most frequent first."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update({problem.problem: problem.count for problem in shard.problems})
        return dict(counts.most_common())

    def to_json(self) -> dict[str, Any]:
        totals = {"whole": self.whole, "samples": self.samples, "bytes": self.bytes, "problems": self.problems}
        return totals | self.model_dump(mode="json")

    def _repr_html_(self) -> str:
        rows = [(name, count, PROBLEMS[name]) for name, count in self.problems.items()]
        return html_table(f"tarsift audit: {verdict_of_audit(self)}", rows)


def audit(
    inputs: str | Sequence[str],
    *,
    decode: bool = False,
    read: ReadConfig | None = None,
    images: ImageConfig | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    progress: Listener = silent,
) -> Audit:
    """Look at every byte of a dump, at what img2dataset left beside its shards, and at uids across shards.

    Args:
        inputs: paths, globs, brace patterns, folders or URLs of `.tar` and `.tar.gz` shards.
        decode: decode every image as well.
        read: where captions are, and limits.
        images: formats and limits of decoding.
        stall_timeout_s: seconds without a shard that is done after which the audit fails.
        progress: told after every shard.

    Raises:
        UsageError: if no shard is found.

    Example:
        >>> found = audit("cc3m/{00000..00331}.tar", decode=True)  # doctest: +SKIP
        >>> found.whole, found.problems                            # doctest: +SKIP
        (False, {'undecodable_image': 12, 'truncated': 1})
    """
    start = time.monotonic()
    shards = list_shards(inputs)
    look = AuditShard(decode=decode, read=read, images=images, key=secrets.token_bytes(16))
    with session(stall_timeout_s=stall_timeout_s), reported(progress) as progress:
        audits, uids = _look_at_all(shards, look, progress)
        names = [shard.name for shard in shards if shard.name in uids]
        samples = sum(audits[name].samples for name in names)
        shared = _shared_uids([uids[name] for name in names], samples)
    for position, more in shared.items():
        found = audits[names[position]]
        audits[found.shard] = found.model_copy(update={"problems": (*found.problems, *more.problems())})
    return Audit(
        shards=tuple(audits[shard.name] for shard in shards),
        decoded=decode,
        elapsed_s=time.monotonic() - start,
        repeated_requests=sum(found.repeated_requests for found in audits.values()) + take_repeated(),
    )


def _look_at_all(
    shards: Sequence[Shard], look: AuditShard, progress: Listener
) -> tuple[dict[str, ShardAudit], dict[str, ray.ObjectRef]]:
    """Audit shards side by side; hashes of uids stay where they were made.

    Those that kill whoever reads them are read again with a decoder in a process of its own.
    """
    audits: dict[str, ShardAudit] = {}
    uids: dict[str, ray.ObjectRef] = {}
    samples = repeated = 0
    progress(Event("audit", 0, len(shards)))
    waiting = list(shards)
    for isolated in (False, True):
        look_ref = ray.put(look.apart() if isolated else look)
        calls = ((shard, (look_ref, shard)) for shard in waiting)
        expendable = look.decode and not isolated
        again = []
        for shard, (result, hashes) in side_by_side(
            _look_at, calls, num_returns=2, max_retries=0 if expendable else None
        ):
            try:
                found = ray.get(result)
                uids[shard.name] = hashes
            except (WorkerCrashedError, OutOfMemoryError) as error:
                if expendable:
                    again.append(shard)
                    continue
                found = _died(shard, error)
            audits[shard.name] = found
            samples += found.samples
            repeated += found.repeated_requests
            progress(Event("audit", len(audits), len(shards), samples, repeated=repeated))
        waiting = again
    progress(Event("audit", len(audits), len(shards), samples, finished=True, repeated=repeated))
    return audits, uids


def _look_at(look: AuditShard, shard: Shard) -> tuple[ShardAudit, np.ndarray]:
    return look(shard)


def _died(shard: Shard, error: RayError) -> ShardAudit:
    told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    problem = Problem(problem="reader_died", count=1, examples=(told,))
    return ShardAudit(
        shard=shard.name, url=storage.without_secrets(shard.url), samples=0, members=0, bytes=shard.size, sha256="",
        compressed=False, digests_checked=0, problems=(problem,),
    )  # fmt: skip


def _shared_uids(uids: Sequence[ray.ObjectRef], samples: int) -> dict[int, Findings]:
    """Compare uids across shards, a part of all hashes at a time; return problems by position of the shard."""
    parts = -(-samples // UIDS_PER_PART)
    found: dict[int, Findings] = defaultdict(Findings)
    for _, (result,) in side_by_side(_compare_part, ((part, (list(uids), part, parts)) for part in range(parts))):
        for position, problems in ray.get(result).items():
            found[position].take_in(problems)
    return found


def _compare_part(uids: Sequence[ray.ObjectRef], part: int, parts: int) -> dict[int, list[Problem]]:
    hashes, shards, rows = [], [], []
    for position, ref in enumerate(uids):
        values = ray.get(ref)
        mine = np.flatnonzero((values >> np.uint64(1)) % np.uint64(parts) == part)
        hashes.append(values[mine])
        shards.append(np.full(len(mine), position, np.int32))
        rows.append(mine.astype(np.int32))
    shard, row = np.concatenate(shards), np.concatenate(rows)
    found: dict[int, list[Problem]] = {}
    for name, mask in zip(("repeated_uid", "forged_uid"), shared_uids(np.concatenate(hashes)), strict=True):
        for position in np.unique(shard[mask]).tolist():
            where = row[mask & (shard == position)]
            examples = tuple(f"row {number}" for number in where[:EXAMPLES].tolist())
            found.setdefault(position, []).append(Problem(problem=name, count=len(where), examples=examples))
    return found
