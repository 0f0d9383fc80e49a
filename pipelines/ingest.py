"""Nightly ingestion: what has come in since the last time is cleaned, and compared with all that came before.

An encoder that stands still cannot see a new backdoor by density. So each night the last encoder is trained a little
further, on tonight's shards and on as many standing samples; the standing reference is embedded anew by it; and
tonight's shards are cleaned by rules that are fitted on both. A witness that never changes judges the captions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray

from tarsift.operators import storage
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.errors import ChangedError, ErrorRateError, UsageError
from tarsift.operators.imported import folder_of
from tarsift.operators.listing import Shard, list_shards, root_of, shards_outside
from tarsift.operators.sides import DETECT, FEATURES
from tarsift.operators.storage import join
from tarsift.pipelines import embed as embedding
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.findings import Finding
from tarsift.pipelines.growing import for_tonight, grow
from tarsift.pipelines.ingest_settings import IngestConfig
from tarsift.pipelines.lock import hold
from tarsift.pipelines.metrics import count_night
from tarsift.pipelines.nights import Arrivals, State, compare
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.pretrain import pretrain
from tarsift.pipelines.printing_nights import rows_of_night
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.report.nights import write_nights_page
from tarsift.pipelines.run import (
    Run,
    absolute_spec,
    refuse_encoders,
    reopen_run,
    with_absolute_paths,
)
from tarsift.pipelines.session import session
from tarsift.pipelines.standing import StandingReference
from tarsift.pipelines.tasks import side_by_side
from tarsift.pipelines.unlike import LOW_IS_BAD, Look, look_at


@dataclass(frozen=True)
class NightResult:
    """What a night brought.

    Attributes:
        night: its number; None: nothing had come in.
        out: its result folder.
        shards: how many came in; changed, gone: names of shards with other bytes than before, and that are not there.
        counts: read = kept + removed + errored.
        findings: the strongest first; drift: sentences, one for each tail or rate that is unlike earlier nights.
        seconds: by part: train, reference, clean, look, grow.
        report: page of the night; nights: that of all nights.
    """

    night: int | None
    out: str | None
    shards: int = 0
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    counts: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    drift: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    report: str | None = None
    nights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "alarming": self.alarming}

    def _repr_html_(self) -> str:
        return html_table("tarsift ingest", rows_of_night(self).items(), {"report": self.report, "nights": self.nights})

    @property
    def alarming(self) -> bool:
        """Whether there is a finding or drift."""
        return bool(self.findings or self.drift)


def ingest(
    inputs: str | Sequence[str],
    state: str,
    *,
    config: IngestConfig | None = None,
    root: str | None = None,
    progress: Listener = silent,
) -> NightResult:
    """Clean the shards that were not seen before, and look whether they are like those of the nights before.

    The same call again goes on with a night that was interrupted; a state that is worked on by another call is busy.

    Args:
        inputs: paths, globs, brace patterns, folders or URLs; all that there are, or those of tonight.
        state: folder of the state, local or `s3://...`; made by the first call.
        config: the settings. The encoder of the role `detect` is where the first night begins.
        root: folder below which shards are named, kept in the state; None: the one the first inputs have in common.
        progress: told what is done; silent by default.

    Raises:
        UsageError: wrong arguments, before any work.
        BusyError: another call works on `state`.
        ErrorRateError: the night is done, but has more bad samples than `max_error_rate`.
    """
    config = config or IngestConfig()
    config = config.model_copy(update={"clean": with_absolute_paths(config.clean)})
    _refuse(config)
    folder = storage.absolute(state)
    known = State.load(folder)
    if known is not None:
        _refuse_other(known, config, root)
    listed = shards_outside(inputs, folder, root=root if known is None else known.root)
    with failures_told(), ExitStack() as stack:
        with storage.reachable(folder):
            stack.enter_context(hold(folder))
        known = State.load(folder)  # once more: another call may have ended just now
        if known is None:
            known = State.begin(folder, root=storage.absolute(root or root_of(listed)), train=config.train)
        result = NightResult(None, None)
        if known.opened() is not None or compare(listed, known.seen()).any_to_read():  # else without starting Ray
            with session(stall_timeout_s=config.clean.resources.stall_timeout_s):
                night = Night.begin(known, listed, config, progress)
                if night is not None:
                    result = night.run()
        known.clear(config.keep)
    return result


def what_came_in(inputs: str | Sequence[str], state: str, *, root: str | None = None) -> Arrivals:
    """Compare a listing with what a state has seen, without any work.

    Raises:
        UsageError: if no shard is found.
    """
    folder = storage.absolute(state)
    known = State.load(folder)
    listed = shards_outside(inputs, folder, root=root if known is None else known.root)
    return compare(listed, known.seen() if known else {})


def _refuse(config: IngestConfig) -> None:
    """Refuse settings that do not go together."""
    clean_ = config.clean
    refuse_encoders(clean_)
    if config.train and DETECT not in clean_.encoders:
        raise UsageError(
            "each night an encoder is trained further: give the one to begin with, --encoder detect=MODEL, or --fixed, "
            "with which encoders stand still and backdoors are found by captions alone."
        )
    imported = [role for role, encoder in clean_.encoders.items() if folder_of(encoder.spec) is not None]
    if imported:
        raise UsageError(f"{imported[0]}: embeddings that were made elsewhere are of one dump; give an encoder.")
    for name in ("key", "path", "standing"):
        if getattr(clean_.reference, name) is not None:
            raise UsageError(f"reference.{name} is the business of the state, and cannot be set here.")


def _refuse_other(state: State, config: IngestConfig, root: str | None) -> None:
    """Refuse what a state was not begun with."""
    if root is not None and storage.absolute(root).rstrip("/") != state.root.rstrip("/"):
        raise UsageError(f"{state.folder} names shards below {state.root}, not below {root}: leave --root out.")
    if config.train != state.content["train"]:
        was = "are trained further each night" if state.content["train"] else "stand still (--fixed)"
        raise UsageError(f"{state.folder} was begun with encoders that {was}: do as then, or begin another state.")


@dataclass
class Night:
    """The work of one night; every step finds what an interrupted call has done of it already."""

    state: State
    config: IngestConfig
    shards: list[Shard]
    arrivals: dict[str, Any]
    progress: Listener = silent
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(cls, state: State, listed: list[Shard], config: IngestConfig, progress: Listener) -> Night | None:
        """Decide which shards tonight takes; None if there is none."""
        opened = state.opened()
        if opened is None:
            seen = state.seen()
            found, touched = _decided(compare(listed, seen), seen)
            shards = sorted([*found.new, *found.changed], key=lambda shard: shard.name)
            if not shards:
                return None
            opened = state.open(
                shards, changed=[shard.name for shard in found.changed], gone=found.gone, touched=touched
            )
        shards = [Shard(**shard) for shard in opened["shards"]]
        return cls(state, config, shards, opened, progress)

    @property
    def number(self) -> int:
        return self.arrivals["night"]

    @property
    def out(self) -> str:
        return self.state.place("nights", self.number)

    def run(self) -> NightResult:
        """Do all of it, and commit; what cannot be done with these shards or settings is forgotten.

        Raises:
            ChangedError: if it was begun with other settings; what was done is kept.
        """
        try:
            return self._run()
        except ChangedError as error:
            raise ChangedError(f"{error} Or remove {self.out}: then the night begins anew.") from None
        except UsageError:
            self.state.abandon()
            raise

    def _run(self) -> NightResult:
        detect = self._timed("train", self._train)
        config = self._settings(detect)
        standing = self._timed("reference", lambda: self._standing(config))
        if standing is not None:
            reference = config.reference.model_copy(update={"standing": standing.folder, "rules": "keep"})
            config = config.model_copy(update={"reference": reference})
        bad = self._timed("clean", lambda: self._clean(config))
        run = reopen_run(self.out)
        look = self._timed("look", lambda: self._look(run))
        grown = self._timed("grow", lambda: self._grow(run, standing))
        record = self._record(run, look, grown)
        self.state.commit(record)
        page = write_nights_page(self.state.folder, self.state.records, LOW_IS_BAD)
        count_night(len(look.findings), len(look.drift))
        if bad is not None:
            raise bad
        return NightResult(
            night=self.number, out=self.out, shards=len(self.shards), changed=tuple(self.arrivals["changed"]),
            gone=tuple(self.arrivals["gone"]), counts=run.content["counts"], findings=look.findings,
            drift=look.drift, seconds=dict(self.seconds), report=join(self.out, "report.html"), nights=page,
        )  # fmt: skip

    def _clean(self, config: CleanConfig) -> ErrorRateError | None:
        """Clean tonight's shards; too many bad samples are told once the night counts."""
        urls = [shard.url for shard in self.shards]
        try:
            clean(urls, self.out, config=config, root=self.state.root, progress=self.progress)
        except ErrorRateError as error:
            return error
        return None

    def _timed(self, part: str, work: Any) -> Any:
        start = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[part] = round(time.monotonic() - start, 3)

    def _train(self) -> str | None:
        """Return the encoder that sees tonight's shards, trained further on them unless encoders stand still."""
        given = self.config.clean.encoders.get(DETECT)
        if not self.config.train or given is None:
            return given and given.spec
        out = self.state.encoder(self.number)
        if storage.exists(out):
            return out
        before = self.state.encoder(self.number - 1)
        base = before if self.state.last else given.spec
        settings = {
            "base": absolute_spec(base), "epochs": self.config.epochs, "seed": self.number,
            "read": self.config.clean.read, "images": self.config.clean.images,
        }  # fmt: skip
        pretrain(
            [*self.shards, *self._replayed()], out=out, config=self.config.pretrain, progress=self.progress, **settings
        )
        return out

    def _replayed(self) -> list[Shard]:
        """Return shards of standing samples, about as many bytes as asked for; they are in random order already."""
        standing = self._stood()
        if standing is None or standing.pictures is None:
            return []
        wanted = self.config.replay * sum(shard.size for shard in self.shards)
        chosen: list[Shard] = []
        for shard in list_shards(standing.pictures):
            if wanted <= 0:
                break
            wanted -= shard.size
            chosen.append(Shard(f".standing/{self.number - 1:04d}/{shard.name}", shard.url, shard.size))
        return chosen

    def _settings(self, detect: str | None) -> CleanConfig:
        """Return the settings of tonight's run, but for the standing reference."""
        config, encoders = self.config.clean, dict(self.config.clean.encoders)
        if detect is not None:
            encoders[DETECT] = encoders.get(DETECT, EncoderConfig(spec=detect)).model_copy(update={"spec": detect})
        reference = config.reference.model_copy(update={"key": self.state.content["key"]})
        return embedding.settled(config.model_copy(update={"encoders": encoders, "reference": reference}))

    def _stood(self) -> StandingReference | None:
        """Return the standing reference as the last night left it."""
        return StandingReference.find(self.state.place("reference", self.number - 1)) if self.state.last else None

    def _standing(self, config: CleanConfig) -> StandingReference | None:
        """Return the standing reference as tonight's encoders see it."""
        stood = self._stood()
        if stood is None:
            return None
        weights = {
            role: encoder_info(encoder.spec).weights_sha256
            for role, encoder in config.encoders.items()
            if role != FEATURES
        }
        changed = self.arrivals["changed"]
        return for_tonight(stood, join(self.out, "standing"), config, weights, changed=changed, progress=self.progress)

    def _look(self, run: Run) -> Look:
        return look_at(run, self.state.records, self.config)

    def _grow(self, run: Run, standing: StandingReference | None) -> StandingReference:
        folder = self.state.place("reference", self.number)
        storage.remove_tree(folder)  # of a call that was interrupted here
        return grow(run, standing, folder, pictures=self.config.train, refit=self.config.refit, progress=self.progress)

    def _record(self, run: Run, look: Look, grown: StandingReference) -> dict[str, Any]:
        shards = {
            shard.name: {"size": shard.size, "stamp": shard.stamp, "sha256": run.digests[shard.name]}
            for shard in self.shards
        }
        return {
            "night": self.number,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "shards": shards,
            **{name: self.arrivals[name] for name in ("changed", "gone", "touched")},
            "weights": dict(grown.weights),
            "reference": {"rows": grown.rows, "rules": run.content["reference"]["rules"]},
            "counts": run.content["counts"],
            **look.to_json(),
            "seconds": self.seconds,
        }


def _decided(found: Arrivals, seen: Mapping[str, Mapping[str, Any]]) -> tuple[Arrivals, dict[str, str]]:
    """Read the shards with another stamp and the same size; return who has changed, and the stamps of the others."""
    if not found.doubtful:
        return found, {}
    touched: dict[str, str] = {}
    calls = ((shard, (shard.url,)) for shard in found.doubtful)
    for shard, (result,) in side_by_side(_sha256, calls):
        if ray.get(result) == seen[shard.name]["sha256"]:
            touched[shard.name] = shard.stamp
        else:
            found.changed.append(shard)
    return found, touched


def _sha256(url: str) -> str:
    with storage.open_read(url) as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  # it has `readinto`
