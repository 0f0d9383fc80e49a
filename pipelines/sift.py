"""Route samples to classes, sift the classes in problems of about ten, and put the verdicts beside the scores.

After `score`, before `flag`, and never by the encoder under test:

1. `classes`  a hashed sample of captions, or names -> centers of classes           sift/classes.npz
2. `route`    every sample to its class                                             sift/routes/<shard>.parquet
   `problems` classes that are left out, the others in groups                       sift/classes.parquet
3. `gather`   features or pictures of the classes that are sifted, by class         sift/.gathered/<shard>.parquet
4. `sifters`  one job per problem, on a GPU where there are some                    sift/problems/<problem>.parquet
5. `sift`     verdicts back to their samples                                        sift/samples/<shard>.parquet
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError, RayTaskError

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.flag import Judged
from tarsift.operators.folds import Count, FetchRows, Highest, SmallestHashes
from tarsift.operators.gather import Gather
from tarsift.operators.grouped import read_groups, write_grouped
from tarsift.operators.router import CountClasses, RouteCaptions, RouteLabels, class_table
from tarsift.operators.schema import SIFTED_FOLDER
from tarsift.operators.shards import Shard
from tarsift.operators.sift_settings import SiftConfig
from tarsift.operators.sifter import CHECKPOINTS, SIFTED, JoinVerdicts, SiftProblem, choose_classes, largest_problem
from tarsift.operators.storage import join
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.commit import run_pass, run_whole
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.flag import select_top, tie_hashes
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.progress import Event, Listener
from tarsift.pipelines.reading import shard_items, shards_of
from tarsift.pipelines.rules import load_arrays, save_arrays
from tarsift.pipelines.session import gpu_share, map_tables
from tarsift.pipelines.stopping import stop_if_asked
from tarsift.pipelines.tasks import checked_task, side_by_side
from tarsift.sifters.problems import ClassRule, Problem, classes_by_caption, classes_by_name, make_problems

CAPTIONS_PER_CLASS = 64  # of the sample that classes are made from
MOST_CAPTIONS = 131_072
PROBLEM_TIMEOUT_S = 24 * 3600.0  # one on pictures can take hours
MOST_JOINS = 32  # tasks of a wave that join verdicts to samples: each opens the files of all problems
SCORE = "suspicion"


@dataclass(frozen=True)
class SiftPasses:
    """The passes of one result folder.

    Args:
        role: whose embeddings are sifted, and route: an encoder that never saw the dump.
        class_names: of the classes, where they are routed by name.
        samples: rows of the dump.
    """

    shards: Sequence[Shard]
    out: str
    config: CleanConfig
    role: str
    fingerprint: str
    key: bytes
    class_names: Sequence[str]
    samples: int
    progress: Listener
    finished: Callable[[str, dict[str, Any]], None]

    @property
    def sift(self) -> SiftConfig:
        return self.config.sift

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    @property
    def embeddings(self) -> str:
        return join(self.out, "embeddings", self.role)

    def folder(self, name: str) -> str:
        return join(self.out, "sift", name)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; return what `run.json` says of it."""
        classes = self._whole("classes", self._make_classes)["classes"]
        self._route()
        plan = self._whole("problems", lambda: self._plan(classes))
        problems = [Problem(name, tuple(members)) for name, members in plan["problems"]]
        failed = self._sift(problems, plan["status"])
        self._join([p for p in problems if p.name not in failed], plan["status"])
        said = run_fold(Count("sift_status"), self.names, [join(self.out, SIFTED_FOLDER)])
        return {
            "role": self.role,
            "sifter": self.sift.method.sifter,
            "classes": {name: plan["status"].count(name) for name in dict.fromkeys(plan["status"])},
            "problems": len(problems),
            "failed": failed,
            "samples": sum(said.values()),
            "sifted": said.get(SIFTED, 0),
            "by_status": dict(sorted(said.items())),
        }

    def _whole(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        ledger = Ledger(self.out, name, self.fingerprint)
        about, figures = run_whole(ledger, work, shards=len(self.shards), samples=self.samples, progress=self.progress)
        self.finished(name, figures)
        return about

    def _make_classes(self) -> dict[str, Any]:
        """Fit and save the centers of classes; of numbers in `.cls` there are as many as the highest one says."""
        route, routing = self.sift.route, self.sift.routing
        if route == "cls":
            return {"classes": self._labels()}
        if route == "captions":
            wanted = max(2, round(self.samples / routing.class_size))
            captions = self._captions(min(MOST_CAPTIONS, max(CAPTIONS_PER_CLASS * wanted, 4096)))
            rule = checked_task(classes_by_caption, captions, self.samples, routing, seed=self.sift.seed)
        else:
            rule = checked_task(_rule_of_names, self.class_names, self.config.encoders[self.role].spec, routing)
        save_arrays(self.folder("classes.npz"), {"centers": rule.centers}, {"least": rule.least})
        return {"classes": len(rule.centers)}

    def _captions(self, count: int) -> np.ndarray:
        """Return the caption embeddings of a hashed sample, at unit length."""
        hashes = run_fold(SmallestHashes(count, key=self.key, salt="route"), self.names, [self.embeddings])
        if not len(hashes):
            raise UsageError("no sample of the dump has an image embedding; see the error counts in the ledger.")
        fold = FetchRows(int(hashes[-1]), key=self.key, salt="route", embedding="text_embedding")
        captions = run_fold(fold, self.names, [self.embeddings])["embeddings"]
        return unit_norm(captions)

    def _labels(self) -> int:
        """Return one more than the highest number in a `.cls`."""
        highest = run_fold(Highest("label"), self.names, [Stored(self.embeddings, ("shard", "row", "label"))])
        if highest is None:
            raise UsageError("no sample has a class: sift.route=cls takes shards with a number in each sample's .cls.")
        return highest + 1

    def _route(self) -> None:
        arguments = {"embeddings": self.embeddings, "rule": None}
        if self.sift.route != "cls":
            arguments["rule"] = self.folder("classes.npz")
        self._each("route", "sift/routes", _route_rows, arguments)

    def _each(
        self,
        name: str,
        folder: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        most_tasks: int | None = None,
    ) -> None:
        """Run a pass over all shards."""

        def stream(wave: list[Shard]) -> ray.data.Dataset:
            return map_tables(shard_items(wave, most_blocks=most_tasks), function, arguments, num_cpus=1)

        result = run_pass(
            Ledger(self.out, name, self.fingerprint), self.shards, stream, folder=folder,
            metadata={"encoder_role": self.role}, wave_shards=self.config.resources.wave_shards,
            progress=self.progress, fused_cpus=1,
        )  # fmt: skip
        self.finished(name, result.figures(self.fingerprint))

    def _plan(self, classes: int) -> dict[str, Any]:
        """Look at every class, and group those that are sifted into problems."""
        judged = Judged(self.config.flag.model_copy(update={"score": SCORE}))
        columns = (*judged.columns, "row")
        scores = join(self.out, "scores")
        cut = select_top(
            self.sift.suspect_fraction, SCORE, self.names, [scores], judged=judged, hashes=tie_hashes, columns=columns
        )
        sources = [
            Stored(self.folder("routes"), ("shard", "row", "class", "class_cosine")),
            Stored(self.embeddings, ("shard", "row", "caption")),
            Stored(scores, ("shard", "row", "duplicate_count", SCORE)),
        ]
        counts = run_fold(CountClasses(classes, score=SCORE, cutoff=cut.score), self.names, sources)
        status = choose_classes(counts.samples, counts.suspects, counts.duplicates, self.sift)
        write_grouped(self.folder("classes.parquet"), class_table(counts, status, self.class_names), "status")
        left_out = [label for label, said in enumerate(status) if said != SIFTED]
        centers = self._centers(classes)
        problems = checked_task(
            make_problems, centers, counts.samples, self.sift.routing, seed=self.sift.seed, leave_out=left_out
        )
        self._check_memory(problems, counts.samples)
        return {
            "problems": [[problem.name, list(problem.classes)] for problem in problems],
            "status": status,
            "samples": counts.samples.tolist(),
            "suspects": int(counts.suspects[np.array(status) == SIFTED].sum()),
            "suspect_cutoff": cut.score,
        }

    def _centers(self, classes: int) -> np.ndarray:
        if self.sift.route == "cls":
            return np.eye(classes, dtype=np.float32)  # nothing is known of what numbers have in common
        return load_arrays(self.folder("classes.npz"))[0]["centers"]

    def _check_memory(self, problems: Sequence[Problem], samples: np.ndarray) -> None:
        if self.sift.method.on_features:
            stored = Stored(self.embeddings, ("image_embedding", "view_embeddings"))
            first = next(iter(ReadStored([stored], batch_rows=1)(self.names[0])))
            bytes_ = 4 * sum(first.schema.field(name).type.list_size for name in first.column_names)
        else:
            bytes_ = 3 * self.sift.picture_size**2
        problem, needed = largest_problem(problems, samples, bytes_)
        if needed > self.sift.memory_gb * 1e9:
            raise UsageError(
                f"the largest problem, of {int(samples[list(problem.classes)].sum()):,} samples, takes "
                f"{needed / 1e9:.1f} GB, and sift.memory_gb is {self.sift.memory_gb:g}: raise it, or lower "
                "sift.routing.classes_per_problem or sift.routing.largest."
            )

    def _gather(self, status: Sequence[str]) -> None:
        """Copy what is sifted of every shard, grouped by class."""
        ledger = Ledger(self.out, "gather", self.fingerprint)
        entries = ledger.begin(self.names)
        wanted = tuple(label for label, said in enumerate(status) if said == SIFTED)
        folders = (self.embeddings, self.folder("routes"), self.folder(".gathered"))
        gather = Gather(*folders, wanted, self.sift, self.config.read, self.config.images)
        gather_ref = ray.put(gather)
        calls = ((shard, (gather_ref, shard)) for shard in self.shards if shard.name not in entries)
        self.progress(Event("gather", len(entries), len(self.shards)))
        for shard, (result,) in side_by_side(_gather_one, calls):
            entries[shard.name] = ledger.commit(shard.name, {"rows": ray.get(result)})
            stop_if_asked()
            self.progress(Event("gather", len(entries), len(self.shards)))
        self.progress(Event("gather", len(entries), len(self.shards), finished=True))

    def _sift(self, problems: Sequence[Problem], status: Sequence[str]) -> dict[str, str]:
        """Sift all problems that are not done; return what was wrong with those that failed, by name."""
        start = time.monotonic()
        ledger = Ledger(self.out, "sifters", self.fingerprint)
        entries = ledger.begin([problem.name for problem in problems])
        waiting = [problem for problem in problems if problem.name not in entries]
        failed: dict[str, str] = {}
        if waiting:
            self._gather(status)
            storage.remove_tree(join(self.out, "ledger", "sift"))  # samples are to be told of more verdicts
            for file in storage.list_files(self.folder("problems"), ".parquet"):
                if file.removesuffix(".parquet") not in entries:  # of other settings
                    storage.remove(join(self.folder("problems"), file))
        gpus = gpu_share(self.config.resources)
        names, out = tuple(self.names), self.folder("problems")
        device = "cuda" if gpus else "cpu"
        job = ray.put(SiftProblem(self.folder(".gathered"), names, out, self.sift, device, self.fingerprint))
        calls = ((problem, (job, problem)) for problem in waiting)
        options = {"num_gpus": gpus, "at_once": self.config.resources.workers, "timeout_s": PROBLEM_TIMEOUT_S}

        def told(finished: bool = False) -> None:
            rows = sum(entry["rows"] for entry in entries.values())
            self.progress(Event("sifters", len(entries), len(problems), rows, unit="problems", finished=finished))

        told()
        for problem, (result,) in side_by_side(_sift_one, calls, **options):
            try:
                entries[problem.name] = ledger.commit(problem.name, ray.get(result))
            except (RayTaskError, RayError) as error:
                failed[problem.name] = reason_of(error)
            stop_if_asked()
            told()
        told(finished=True)
        if not failed:
            for folder in (self.folder(".gathered"), join(out, CHECKPOINTS)):
                storage.remove_tree(folder)
        rows = sum(entry["rows"] for entry in entries.values())
        elapsed = round(time.monotonic() - start, 3)
        figures = {"shards": len(self.shards), "samples": rows, "problems": len(entries), "elapsed_s": elapsed}
        self.finished("sifters", {**figures, "fingerprint": self.fingerprint})
        return failed

    def _join(self, problems: Sequence[Problem], status: Sequence[str]) -> None:
        files = [join(self.folder("problems"), f"{problem.name}.parquet") for problem in problems]
        arguments = {
            "routes": self.folder("routes"),
            "scores": join(self.out, "scores"),
            "verdicts": files,
            "status": list(status),
            "weight": self.sift.weight,
        }
        self._each("sift", SIFTED_FOLDER, _join_rows, arguments, most_tasks=MOST_JOINS)


def reason_of(error: Exception) -> str:
    """Return the first line of what went wrong in a task."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def _rule_of_names(names: Sequence[str], spec: str, routing: Any) -> ClassRule:
    from tarsift.operators.models import load_encoder
    from tarsift.operators.towers import encode_captions

    texts = np.array([f"a photo of a {name}" for name in names], object)
    embedded = encode_captions(load_encoder(spec), texts, micro_batch=64)
    return classes_by_name(unit_norm(embedded), routing)


def _route_rows(items: pa.Table, *, embeddings: str, rule: str | None) -> Iterator[pa.Table]:
    if rule is None:
        append_class: Callable[[pa.Table], pa.Table] = RouteLabels()
        column = "label"
    else:
        arrays, about = load_arrays(rule)
        append_class, column = RouteCaptions(ClassRule(arrays["centers"], about["least"])), "text_embedding"
    read = ReadStored([Stored(embeddings, ("shard", "row", "key", "error", column))], receipts=True)
    for shard in shards_of(items):
        for table in read(shard.name):
            yield append_class(table)


def _gather_one(gather: Gather, shard: Shard) -> int:
    return gather(shard)


def _sift_one(job: SiftProblem, problem: Problem) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # a result must not depend on how many there are
    return job(problem)


def _join_rows(
    items: pa.Table, *, routes: str, scores: str, verdicts: Sequence[str], status: Sequence[str], weight: float
) -> Iterator[pa.Table]:
    sources = [Stored(routes), Stored(scores, ("shard", "row", "uid", SCORE))]
    read = ReadStored(sources, batch_rows=8192, receipts=True)
    shards = shards_of(items)
    names = {shard.name for shard in shards}
    columns = {"shard": pa.string(), "row": pa.int32(), "rank": pa.float32()}
    found = [read_groups(file, names).select(list(columns)).cast(pa.schema(columns)) for file in verdicts]
    of_all = pa.concat_tables([pa.schema(columns).empty_table(), *found])
    for shard in shards:
        own = of_all.filter(pc.field("shard") == shard.name)
        yield from map(JoinVerdicts(own, status, weight=weight), read(shard.name))
