"""A result folder being worked on: opened, taken up again, and asked what of it is complete."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tarsift.operators import storage
from tarsift.operators.errors import BusyError, ChangedError, ConfigError, UsageError
from tarsift.operators.listing import Shard, shards_outside
from tarsift.operators.schema import SCHEMA_VERSION
from tarsift.operators.sides import DETECT, FEATURES, ROLES, WITNESS
from tarsift.pipelines.class_names import with_class_names
from tarsift.pipelines.commit import PassResult
from tarsift.pipelines.config import CleanConfig, parse_config, put_setting, refuse_changes
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.installed import providers
from tarsift.pipelines.ledger import Ledger, RunFile, fingerprint, records_of
from tarsift.pipelines.lock import hold
from tarsift.pipelines.metrics import Reporter, reported
from tarsift.pipelines.passes import AT_ONCE, SETTINGS_OF, embed_name, passes_of, passes_of_score
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.session import session

PACKAGES = ("ray", "torch", "open_clip_torch", "pyarrow", "numpy", "Pillow", "tarsift")

NO_FEATURES = (
    "sifting takes features of an encoder that never saw the dump: give --encoder features=MODEL, or a witness."
)


@dataclass
class Run:
    """The shards, settings and `run.json` of a result folder."""

    out: str
    shards: list[Shard]
    config: CleanConfig
    file: RunFile
    progress: Listener = silent
    _complete: dict[str, tuple[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    _reporter: Reporter | None = None

    @property
    def content(self) -> dict[str, Any]:
        return self.file.content

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have an encoder; the first one's files say which samples there are."""
        return tuple(role for role in ROLES if role in self.config.encoders)

    @property
    def sift_role(self) -> str | None:
        """The role whose embeddings are routed and sifted: one that never saw the dump; None: there is none."""
        return next((role for role in (FEATURES, WITNESS) if role in self.config.encoders), None)

    def passes(self, *, density: bool | None = None) -> list[tuple[str, str]]:
        """The passes of this run in their order, each with what it does; density: None = as the roles say."""
        sift = self.config.sift.enabled or "classes" in self.content["passes"]
        return passes_of(self.roles, density=DETECT in self.roles if density is None else density, sift=sift)

    def parts_of(self, name: str) -> list[str]:
        """What a pass commits one by one: shards, or problems, of which nothing is known before there is a plan."""
        if name == "sifters":
            plans = [record["about"]["problems"] for record in records_of(self.out, "problems")]
            return [problem for problem, _ in plans[0]] if plans else []
        return ["all"] if name in AT_ONCE else self.names

    @property
    def embedded(self) -> dict[str, dict[str, Any]]:
        """Ledger entries of the (first) embed pass by shard: its source, what was read from it, and its part.

        Raises:
            UsageError: if shards are not embedded yet.
        """
        return self.complete(embed_name(self.roles[0]))[1]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every shard, as it was when it was embedded."""
        return {name: entry["source"]["sha256"] for name, entry in sorted(self.embedded.items())}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work on the result folder, as the only one that does.

        Raises:
            BusyError: if another run works on it, or did so since it was opened here.
            UsageError: if it cannot be written to.
        """
        with failures_told(), ExitStack() as stack:
            with storage.reachable(self.out):
                stack.enter_context(hold(self.out))
            if self.file.changed():
                raise BusyError(f"another run has worked on {self.out} just now; run the same command again.")
            self.file.save()
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the result folder, with Ray there, and report what is done as metrics."""
        told = self.progress
        with (
            self.held(),
            session(stall_timeout_s=self.config.resources.stall_timeout_s),
            reported(told) as self._reporter,
        ):
            self.progress = self._reporter
            try:
                yield
            finally:
                self.progress, self._reporter = told, None

    def settle(self, config: CleanConfig) -> None:
        """Keep settings in which `auto` is settled, for the rest of the run and for those that continue it."""
        self.config, plain = config, config.model_dump(mode="json")
        if plain != self.content["config"]:
            self.content["config"] = plain
            self.file.save()

    def fingerprint_of(self, name: str) -> str | None:
        """Fingerprint under which a pass was last done; None if it never was."""
        return self.content.get("passes", {}).get(name, {}).get("fingerprint")

    def done(self, result: PassResult, print_: str) -> None:
        """Keep what a pass has just done, in `run.json` and for the steps that follow."""
        self._complete[result.name] = print_, result.entries
        self.record(result.name, result.figures(print_))

    def record(self, name: str, figures: dict[str, Any]) -> None:
        """Keep the figures of a pass in `run.json`, and with them the settings that it was done with."""
        if name in SETTINGS_OF or name.startswith("embed."):
            self.content["config"] = self.config.model_dump(mode="json")
        self.file.record_pass(name, figures)
        if name == "flag" and self._reporter:
            self._reporter.judged(self.content.get("counts", {}))

    def complete(self, name: str) -> tuple[str, dict[str, dict[str, Any]]]:
        """Return fingerprint and ledger entries of a pass that later ones build on.

        Raises:
            UsageError: if it is not done for every shard; the message names the command that does it.
        """
        print_ = self.fingerprint_of(name)
        if name in self._complete and self._complete[name][0] == print_:
            return self._complete[name]
        entries = Ledger(self.out, name, print_).entries(self.names) if print_ else {}
        missing = [n for n in self.names if n not in entries]
        if missing or print_ is None:
            embeds = name.startswith("embed.")
            again = "tarsift embed` or `tarsift clean" if embeds else f"tarsift {name} {self.out}"
            if name == embed_name(FEATURES):
                again = f"tarsift sift {self.out} --encoder features=MODEL"
            raise UsageError(
                f"{len(missing)} of {len(self.shards)} shards of {self.out} have not been through the pass {name} "
                f"(first: {missing[0] if missing else '-'}): run `{again}` first."
            )
        if name == "score" and not Ledger(self.out, "enriched", print_).entries(["all"]):
            raise UsageError(
                f"the rules in {self.out}/reference are no longer those of the scores: scoring with other settings was "
                f"begun and not finished. Run `tarsift score {self.out}` first."
            )
        self._complete[name] = print_, entries
        return print_, entries

    def wanted_fingerprints(self) -> dict[str, str]:
        """Fingerprint that each later pass must have to agree with the settings and the passes before it."""
        scores = [self.fingerprint_of(name) for name in passes_of_score(self.config.flag.score)]
        flag = fingerprint("flag", scores, self.config.flag.model_dump(mode="json"))
        write = fingerprint("write", flag, self.config.write.model_dump(mode="json"))
        sift = fingerprint(
            "sift", self.fingerprint_of(embed_name(self.sift_role or "")), self.fingerprint_of("score"),
            self.config.sift.model_dump(mode="json", exclude={"enabled"}),
        )  # fmt: skip
        return {"sift": sift, "flag": flag, "write": write, "report": fingerprint("report", write)}

    def stale_passes(self) -> list[str]:
        """Passes whose result was made from an earlier state of the passes before them."""
        wanted = self.wanted_fingerprints()
        return [n for n in wanted if n != "report" and self.fingerprint_of(n) not in (None, wanted[n])]


def open_run(
    inputs: str | Sequence[str],
    out: str,
    config: CleanConfig,
    *,
    root: str | None = None,
    progress: Listener = silent,
) -> Run:
    """Start a result folder, or go on with the one that is there; nothing is written before it is `held`.

    Args:
        root: folder below which shards are named; None: the one that all have in common.

    Raises:
        ChangedError: if `out` was made from other shards or with other settings.
        UsageError: if no encoder is given or nothing is found.
    """
    refuse_encoders(config)
    out = storage.absolute(out)
    config = with_absolute_paths(config.with_sifted_score())
    config = with_class_names(config) if config.sift.enabled else config
    shards = shards_outside(inputs, out, root=root)
    listed = [{"name": s.name, "url": s.url, "size": s.size} for s in shards]
    with storage.reachable(out):
        file = RunFile.load(out)
    if file is None:
        file = RunFile.begin(out, _new_content(config, listed))
        return Run(out, shards, config, file, progress)
    refuse_other_inputs(file.content["inputs"], listed, out)
    before = parse_config(file.content["config"])
    config = with_choices_of(before, config)
    refuse_changes(before.result_settings(), config.result_settings(), out=out)
    file.content["config"] = config.model_dump(mode="json")
    return Run(out, shards, config, file, progress)


def refuse_encoders(config: CleanConfig) -> None:
    """Refuse encoders that cannot do what their roles ask for.

    Raises:
        UsageError: says what to give instead.
    """
    if not config.encoders:
        raise UsageError(
            "no encoder: give --encoder detect=MODEL, a CLIP trained on this dump "
            "(`tarsift pretrain SHARDS --out enc.pt`, then --encoder detect=enc.pt), --encoder witness=MODEL, one that "
            "never saw it, or both."
        )
    unknown = sorted(set(config.encoders) - set(ROLES))
    if unknown:
        raise UsageError(f"there is no encoder role {unknown[0]!r}; the roles are {' and '.join(ROLES)}.")
    if not set(config.encoders) - {FEATURES}:
        raise UsageError(
            "an encoder for features alone judges nothing: give --encoder detect=MODEL, --encoder witness=MODEL, or "
            "both."
        )
    if config.sift.enabled and not {FEATURES, WITNESS} & set(config.encoders):
        raise UsageError(NO_FEATURES)
    if WITNESS in config.encoders and set(config.encoders[WITNESS].towers) != {"image", "text"}:
        raise UsageError("the witness judges how well captions fit: its `towers` must be image and text.")
    if config.reference.path is not None and DETECT not in config.encoders:
        raise UsageError(
            "a trusted reference is what densities are compared with, which takes an encoder trained on this dump: "
            "give --encoder detect=MODEL, or leave --reference out."
        )


def reopen_run(
    out: str, changes: Mapping[str, Any] | None = None, *, redo: str | None = None, progress: Listener = silent
) -> Run:
    """Take up a result folder to redo one of its passes, with some settings changed.

    `run.json` keeps the changed settings when that pass is done with them, not before.

    Args:
        changes: dotted setting names to values.
        redo: the pass; settings that others depend on cannot be changed then. None: any can, for who looks only.

    Raises:
        UsageError: if `out` is no result folder.
        ConfigError: for a setting that does not exist, is out of range, or belongs to another pass.
    """
    out = storage.absolute(out)
    with storage.reachable(out):
        file = RunFile.load_or_refuse(out)
    content = copy.deepcopy(file.content["config"])
    for name, value in (changes or {}).items():
        if redo is not None:
            refuse_setting(name, redo)
        put_setting(content, name, value)
    config = with_choices_of(parse_config(file.content["config"]), with_absolute_paths(parse_config(content)))
    config = with_class_names(config) if redo == "sift" else config
    return Run(out, [Shard(**item) for item in file.content["inputs"]], config, file, progress)


def reopen_judged(out: str) -> Run:
    """Take up a result folder for those who go by its verdicts.

    Raises:
        UsageError: if it is no result folder, not yet flagged, or its verdicts are out of date.
    """
    run = reopen_run(out)
    run.complete("flag")
    if "flag" in run.stale_passes():
        raise UsageError(
            f"the verdicts of {run.out} are out of date: it was scored anew. Run `tarsift flag {run.out}` first."
        )
    return run


def refuse_setting(name: str, redo: str) -> None:
    """Refuse a setting that has no effect on a pass that is redone.

    Raises:
        ConfigError: says which have.
    """
    groups = (*SETTINGS_OF[redo], "resources", "max_error_rate")
    if not any(f"{name}.".startswith(f"{group}.") for group in groups):
        raise ConfigError(
            f"{name} does not belong to the pass {redo}, which has the settings {', '.join(groups)}. "
            "Redo the pass it belongs to, or run `tarsift clean` with another --out."
        )


def with_absolute_paths(config: CleanConfig) -> CleanConfig:
    """Make local paths in the settings absolute: encoder files and a trusted reference."""
    encoders = {
        role: encoder.model_copy(update={"spec": absolute_spec(encoder.spec)})
        for role, encoder in config.encoders.items()
    }
    reference = config.reference
    for name in ("path", "standing"):
        if (given := getattr(reference, name)) is not None:
            reference = reference.model_copy(update={name: storage.absolute(given)})
    return config.model_copy(update={"encoders": encoders, "reference": reference})


def absolute_spec(spec: str) -> str:
    """Make the file of `FILE` or `ARCHITECTURE:FILE` absolute; other specs are names."""
    if os.path.exists(spec):
        return storage.absolute(spec)
    architecture, colon, file = spec.partition(":")
    return f"{architecture}:{storage.absolute(file)}" if colon and os.path.exists(file) else spec


def with_choices_of(before: CleanConfig, config: CleanConfig) -> CleanConfig:
    """Keep what a run has chosen for `auto`: continued on another machine, it must not choose again."""
    encoders = {}
    for role, encoder in config.encoders.items():
        chosen = before.encoders.get(role, encoder)
        precision = chosen.precision if encoder.precision == "auto" else encoder.precision
        views = chosen.views if encoder.views is None else encoder.views
        update = {"precision": precision, "micro_batch": encoder.micro_batch or chosen.micro_batch, "views": views}
        encoders[role] = encoder.model_copy(update=update)
    return config.model_copy(update={"encoders": encoders})


def _new_content(config: CleanConfig, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tarsift": version("tarsift"),
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
        "versions": package_versions(),
        "passes": {},
    }


def package_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version(), **providers("faiss")}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def refuse_other_inputs(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], out: str) -> None:
    """Compare the shards of a run with those given now, by name and size.

    Raises:
        ChangedError: naming what was added, is gone or has another size.
    """
    old, new = ({item["name"]: item["size"] for item in items} for items in (before, after))
    other_size = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    parts = [
        *(f"{name} is gone" for name in sorted(old.keys() - new.keys())),
        *(f"{name} is new" for name in sorted(new.keys() - old.keys())),
        *(f"{name} has {new[name]} bytes, had {old[name]}" for name in other_size),
    ]
    if parts:
        shown = "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
        raise ChangedError(f"{out} was made from other shards: {shown}. Give the same shards, or another --out.")
