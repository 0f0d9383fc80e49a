"""From what a trained model says wrongly of a picture back to the training samples that taught it.

1. `random`      a random sample of the dump's pairs; captions of it that say different things
2. `curvature`   what all traces of one encoder share, fitted on that sample        trace/.curvature/<digest>/
3. `candidates`  suspects, captions like what the model says, and random samples
4. `trace`       Delta-Influence of each candidate, slice by slice                   trace/<name>/.slices/
5. the ranking and a page of pictures                                                trace/<name>/
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.encoder_info import info_of
from tarsift.operators.errors import UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.models import load_encoder
from tarsift.operators.regime import Regime, encoder_regime
from tarsift.operators.schema import places_of
from tarsift.operators.shards import Shard
from tarsift.operators.storage import join
from tarsift.operators.stored import Stored, put_table
from tarsift.operators.towers import LoadedEncoder
from tarsift.operators.trace_settings import TracingConfig
from tarsift.operators.trace_verdict import Question, ask_in_rounds
from tarsift.operators.tracer import (
    BANKS,
    FitCurvature,
    TraceSlice,
    concepts_of,
    echo_of,
    embed_captions,
    refuse_too_large,
    said_of,
)
from tarsift.pipelines.choosing import SUSPICION, Alike, by_suspicion, choose, choose_random
from tarsift.pipelines.ledger import Ledger, fingerprint
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.passes import embed_name
from tarsift.pipelines.printing import rows_of_trace
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.report.tracing import write_trace_page
from tarsift.pipelines.rules import save_arrays
from tarsift.pipelines.run import Run, absolute_spec, reopen_run
from tarsift.pipelines.session import gpu_share
from tarsift.pipelines.stopping import stop_if_asked
from tarsift.pipelines.tasks import side_by_side

FOLDER, CURVATURE, SLICES = "trace", ".curvature", ".slices"
ABOUT, SAMPLES, QUERIES = "trace.json", "samples.parquet", "queries.npz"
JOB_TIMEOUT_S = 24 * 3600.0  # the curvature of a large model takes an hour on a GPU
CAPTIONS = 4096  # of the random sample, among which those of different concepts are looked for
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a trace, which is that of its folder


@dataclass(frozen=True)
class TraceResult:
    """What was traced.

    Attributes:
        name: of the trace; its files are in OUT/trace/NAME.
        says: what the model says of the queries, which was traced.
        candidates: samples that were looked at; of: samples of the dump.
        traced: those of them that it was traced to.
        samples: URL of the Parquet file with every candidate, the most probable first.
        report: URL of the page.
        regime: what is known of the encoder's training on this dump.
    """

    name: str
    says: str
    candidates: int
    of: int
    traced: int
    samples: str
    report: str
    regime: str
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return html_table("tarsift trace", rows_of_trace(self).items(), {"report": self.report})


def trace(
    out: str,
    *,
    encoder: str,
    queries: Sequence[str],
    says: str,
    name: str | None = None,
    config: TracingConfig | None = None,
    progress: Listener = silent,
) -> TraceResult:
    """Trace what a CLIP says of pictures back to samples of the dump it was trained on.

    The same call again goes on where it stopped, or returns what is there. It needs no scores, and looks at the
    suspects first where there are some.

    Args:
        out: result folder of `clean` or `embed` over the dump.
        encoder: the CLIP that says so, as `--encoder detect=` takes it.
        queries: pictures of which it says `says` and should not; several of one trigger are better than one.
        says: the caption.
        name: of the trace; a digest of what is asked where None.
        config: settings.
        progress: told what is done.

    Raises:
        UsageError: `out` is no result folder, a query cannot be read, the encoder does not say so of it or was not
            trained on the dump, or nothing of the dump can be looked at.
        BusyError: another run works on it.
    """
    start, config = time.monotonic(), config or TracingConfig()
    run = reopen_run(out, progress=progress)
    run.complete(embed_name(run.roles[0]))
    if not says.strip():
        raise UsageError("`says` is empty: give the caption that the model gives the pictures.")
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(f"the name of a trace is that of its folder: letters, digits, and `._-`; got {name!r}.")
    encoder = absolute_spec(encoder)
    loaded = load_encoder(encoder)
    pictures = read_queries(queries, loaded)
    refuse_too_large(loaded, config)
    tracing = _Tracing(run, encoder, loaded, pictures, says, config, regime_of(loaded, run))
    print_ = tracing.fingerprint()
    name = name or print_[:8]
    folder = join(run.out, FOLDER, name)
    about = load_trace(folder) if storage.exists(join(folder, ABOUT)) else {}
    if about.get("fingerprint") != print_:
        with run.working():
            found, about = tracing.find(name, print_, queries)
            about["elapsed_s"] = round(time.monotonic() - start, 3)
            put_table(join(folder, SAMPLES), found)
            save_arrays(join(folder, QUERIES), {"pictures": pictures}, {})
            about["report"] = write_trace_page(folder, about, found, run.shards, pictures)
            storage.put_bytes(join(folder, ABOUT), json.dumps(about, indent=1).encode())
            for left in (join(run.out, FOLDER, SLICES), join(run.out, "ledger", f"{FOLDER}.{name}")):
                storage.remove_tree(left)
    return TraceResult(
        samples=join(folder, SAMPLES),
        **{field: about[field] for field in TraceResult.__dataclass_fields__ if field in about},
    )


def load_trace(folder: str) -> dict[str, Any]:
    """Return what is known of a trace.

    Raises:
        UsageError: if there is none.
    """
    try:
        return json.loads(storage.read_bytes(join(folder, ABOUT)))
    except FileNotFoundError:
        raise UsageError(f"there is no trace in {folder}: make one with `tarsift trace`.") from None


def read_queries(urls: Sequence[str], encoder: LoadedEncoder) -> np.ndarray:
    """Return pictures (q, size, size, 3) uint8 as the encoder takes them.

    Raises:
        UsageError: there is none, one is not there, or is no picture.
    """
    if not urls:
        raise UsageError("give at least one picture of which the model says what it should not.")
    how = {"interpolation": encoder.interpolation, "resize_mode": encoder.resize_mode}
    pictures = []
    with IsolatedDecoder(encoder.image_size, **how, config=ImageConfig()) as decode:
        for url in urls:
            with storage.reachable(url):
                if not storage.exists(url):
                    raise UsageError(f"there is no picture {url}.")
                data = storage.read_bytes(url)
            try:
                pictures.append(decode(data))
            except UnusableImage as error:
                raise UsageError(f"{url} cannot be used as a picture: {error.reason}.") from None
    return np.stack(pictures)


def regime_of(encoder: LoadedEncoder, run: Run) -> Regime:
    """Compare what an encoder was trained on with the dump.

    Raises:
        UsageError: if it never saw it: nothing there can be behind what it says.
    """
    regime = encoder_regime(info_of(encoder), run.digests)
    if regime.code == "not_trained_on_this_dump":
        raise UsageError(f"{regime.sentence} Nothing there can be behind what it says.")
    return regime


@dataclass(frozen=True)
class _Tracing:
    """One trace of one result folder."""

    run: Run
    spec: str
    encoder: LoadedEncoder
    pictures: np.ndarray
    says: str
    config: TracingConfig
    regime: Regime

    @property
    def images(self) -> ImageConfig:
        return self.run.config.images

    @property
    def role(self) -> str:
        """Whose captions are compared: the traced encoder's own if it has embedded the dump, else the first."""
        known = self.run.content.get("encoders", {})
        own = [r for r in self.run.roles if known.get(r, {}).get("weights_sha256") == self.encoder.weights_sha256]
        return (own or list(self.run.roles))[0]

    @property
    def device(self) -> str:
        return "cuda" if gpu_share(self.run.config.resources) else "cpu"

    def fingerprint(self) -> str:
        """Digest of all that the trace depends on."""
        pictures = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in self.pictures]
        passes = [self.run.fingerprint_of(name) for name in (embed_name(self.role), "score")]
        settings = self.config.model_dump(mode="json")
        return fingerprint("trace", self.encoder.weights_sha256, pictures, self.says, settings, passes)

    def find(self, name: str, print_: str, queries: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
        """Return every candidate, the most probable first, and what is to be known of them."""
        few = self.config.method.curvature_samples
        most = max(few, CAPTIONS, self.config.others)
        sample = choose_random(self.run, self.role, most, salt=f"trace {self.config.seed}")
        question = Question(self.pictures, self._concepts(sample["caption"].to_pylist()))
        self._refuse_unsaid(question, queries)
        candidates = self._candidates(sample.slice(0, self.config.others))
        curvature = self._curvature(sample.slice(0, few))

        def ask(number: int, asked: Question) -> pa.Table:
            return self._slices(name, print_, number, asked, curvature, candidates)

        def echo(found: pa.Table) -> Question | None:
            return echo_of(found, question, self.encoder, self._shards(), self.images, self.config)

        found, cutoff, echoes = ask_in_rounds(ask, question, echo, self.config)
        return found, {
            "name": name,
            "fingerprint": print_,
            "says": self.says,
            "queries": [storage.without_secrets(query) for query in queries],
            "encoder": {"spec": storage.without_secrets(self.spec), "weights_sha256": self.encoder.weights_sha256},
            "regime": self.regime.sentence,
            "config": self.config.model_dump(mode="json"),
            "concepts": list(question.concepts),
            "echoes": echoes,
            "cutoff": round(cutoff, 3),
            "candidates": len(found),
            "of": sum(entry["rows"] for entry in self.run.embedded.values()),
            "traced": int(np.asarray(found["traced"]).sum()),
        }

    def _concepts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Return what is said, and captions of the dump that say other things."""
        if not captions:
            raise UsageError(f"no sample of {self.run.out} has an image and a caption: there is nothing to trace to.")
        concepts = concepts_of(self.encoder, self.says, captions, self.config)
        if len(concepts) == 1:
            raise UsageError(
                f"to the encoder all captions of {self.run.out} say the same as {self.says!r}: there is nothing else "
                "that it could say of a picture."
            )
        return concepts

    def _refuse_unsaid(self, question: Question, queries: Sequence[str]) -> None:
        """Refuse pictures of which the model says something else.

        Raises:
            UsageError: names the first, and what the model says of it.
        """
        for query, cosines in zip(queries, said_of(self.encoder, question), strict=True):
            best = int(cosines.argmax())
            if best:
                raise UsageError(
                    f"of {query} the encoder says {question.concepts[best]!r} (cosine {cosines[best]:.2f}) rather than "
                    f"{self.says!r} ({cosines[0]:.2f}): there is nothing to trace."
                )

    def _candidates(self, others: pa.Table) -> pa.Table:
        """Return random samples, suspects, and captions like what is said, each sample once, by shard and row."""
        groups = {"random": others}
        if self.config.suspects and self.run.fingerprint_of("score"):
            scores = Stored(join(self.run.out, "scores"), ("shard", "row", SUSPICION))
            groups["suspect"] = choose(self.run, self.role, self.config.suspects, by_suspicion, (SUSPICION,), [scores])
        said = self._said_stored() if self.config.alike else None
        if said is not None:
            groups["alike"] = choose(self.run, self.role, self.config.alike, Alike(said), ("text_embedding",))
        why: dict[tuple[str, int], list[str]] = {}
        for name, table in groups.items():
            for place in places_of(table):
                why.setdefault(place, []).append(name)
        whole = pa.concat_tables(groups.values())
        places = places_of(whole)
        first = {place: row for row, place in reversed(list(enumerate(places)))}
        order = sorted(why)
        return whole.take(pa.array([first[place] for place in order])).append_column(
            "candidate", pa.array([why[place] for place in order], pa.list_(pa.string()))
        )

    def _said_stored(self) -> np.ndarray | None:
        """Return what is said as the encoder embeds it whose captions are stored; None where none are."""
        config = self.run.config.encoders[self.role]
        if "text" not in config.towers:
            return None
        own = self.run.content["encoders"][self.role]["weights_sha256"] == self.encoder.weights_sha256
        return embed_captions(self.encoder if own else load_encoder(config.spec), [self.says])[0]

    def _curvature(self, sample: pa.Table) -> str:
        """Return the folder of the encoder's curvature, fitted now unless it was for an earlier trace."""
        method = self.config.method.model_dump(include={"hessian", "curvature_samples"})
        settings = self.config.model_dump(include={"bank", "seed", "layers"})
        embedded = self.run.fingerprint_of(embed_name(self.role))
        print_ = fingerprint("curvature", self.encoder.weights_sha256, settings, method, embedded)
        folder = join(self.run.out, FOLDER, CURVATURE, print_)
        self.run.progress(Event("curvature", 0, 1, unit="sample"))
        if not storage.exists(join(folder, BANKS)):  # which is written last
            job = FitCurvature(self.spec, self._shards(), self.images, folder, self.config, self.device)
            gpus = gpu_share(self.run.config.resources)
            call = [("the curvature", (job, sample))]
            for _, (result,) in side_by_side(_fit, call, num_gpus=gpus, timeout_s=JOB_TIMEOUT_S):
                ray.get(result)
        self.run.progress(Event("curvature", 1, 1, len(sample), unit="sample", finished=True))
        return folder

    def _slices(
        self, name: str, print_: str, number: int, question: Question, curvature: str, candidates: pa.Table
    ) -> pa.Table:
        """Trace what is not traced yet in a round, and return all."""
        size = self.config.slice
        parts = {
            f"{number}-{start // size:05}": candidates.slice(start, size) for start in range(0, len(candidates), size)
        }
        ledger, folder = Ledger(self.run.out, f"{FOLDER}.{name}", print_), join(self.run.out, FOLDER, SLICES, print_)
        there = set(storage.list_files(folder, ".parquet"))
        done = {part: entry for part, entry in ledger.begin(parts).items() if f"{part}.parquet" in there}
        resources, what = self.run.config.resources, "trace" if not number else f"trace ({number})"

        def told(*, finished: bool = False) -> None:
            rows = sum(entry["rows"] for entry in done.values())
            self.run.progress(Event(what, len(done), len(parts), rows, unit="slices", finished=finished))

        told()
        job = TraceSlice(self.spec, self._shards(), self.images, curvature, question, self.config, self.device)
        held = ray.put(job)
        waiting = [part for part in parts if part not in done]
        calls = ((part, (held, parts[part], join(folder, f"{part}.parquet"))) for part in waiting)
        options = {"num_gpus": gpu_share(resources), "at_once": resources.workers, "timeout_s": JOB_TIMEOUT_S}
        for part, (result,) in side_by_side(_trace_slice, calls, **options):
            done[part] = ledger.commit(part, {"rows": ray.get(result)})
            stop_if_asked()
            told()
        told(finished=True)
        files = [join(folder, f"{part}.parquet") for part in parts]
        return pa.concat_tables(pq.read_table(io.BytesIO(storage.read_bytes(file))) for file in files)

    def _shards(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.run.shards}


def _fit(job: FitCurvature, sample: pa.Table) -> int:
    import torch

    torch.set_num_threads(1)  # a result must not depend on how many there are
    return job(sample)


def _trace_slice(job: TraceSlice, candidates: pa.Table, out: str) -> int:
    import torch

    torch.set_num_threads(1)
    found = job(candidates)
    put_table(out, found)
    return len(found)
