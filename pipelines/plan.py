"""What a run will do, before it does it: shards, passes, resources and what it can and cannot see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.encoder_settings import EncoderInfo
from tarsift.operators.errors import TarsiftError
from tarsift.operators.regime import encoder_regime
from tarsift.operators.shards import ReadShard
from tarsift.operators.sides import choose_sides
from tarsift.pipelines import sizing
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.embed import embed_fingerprint
from tarsift.pipelines.fitting import TRUSTED
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.passes import EMBED_DOES, embed_name
from tarsift.pipelines.run import Run, open_run
from tarsift.pipelines.text import blanked, duration, size

NODE_CPUS, NODE_GPU = 16, "A100"  # of the node whose memory is told


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        samples: of the shards that are embedded already; None while none is.
        passes: (name, what it does, shards done, shards in total); of sifting, problems, 0 before there is a plan.
        coverage: which poisoning rates the rule can see, as a sentence.
        encoders: per role (encoder, what is known of it and the dump).
        looked_for, not_looked_for: kinds of attack, if the encoders are what the roles say.
        needs: what the run takes, as (what, figure) by `sizing`; empty unless asked for.
    """

    out: str
    shards: int
    bytes: int
    samples: int | None
    passes: list[tuple[str, str, int, int]]
    encoders: dict[str, tuple[str, str]]
    looked_for: tuple[str, ...]
    not_looked_for: tuple[str, ...]
    coverage: str | None
    resources: dict[str, Any]
    config: dict[str, Any] = field(repr=False)
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def headline(self) -> str:
        done = self.passes[0][2]
        so_far = f", {done} of them embedded already" if done else ""
        return f"{self.shards} shards, {size(self.bytes)}{so_far} -> {self.out}"


def make_plan(inputs: str | Sequence[str], out: str, config: CleanConfig, *, sized: bool = False) -> Plan:
    """Plan a run without starting Ray; refuses what the run itself would refuse.

    Args:
        sized: say what the run needs too, for which the beginning of a shard is read if none is embedded yet.

    Raises:
        UsageError, ChangedError: as `clean` would, before any work.
    """
    run = open_run(inputs, out, config)
    names = run.names
    passes, encoders, regimes, infos = [], {}, {}, []
    samples = embedded_shards = embedded_bytes = 0
    for role in run.roles:
        info = encoder_info(run.config.encoders[role].spec)
        infos.append(info)
        name = embed_name(role)
        embedded = Ledger(out, name, embed_fingerprint(run.config, role, info)).entries(names)
        passes.append((name, EMBED_DOES, len(embedded), len(names)))
        complete = len(embedded) == len(names)
        digests = {name: entry["source"]["sha256"] for name, entry in embedded.items()} if complete else None
        regime = encoder_regime(info, digests)
        regimes[role] = regime.code if complete else None
        pixels = f"{info.image_size} px, " if info.image_size else ""  # embeddings made elsewhere have none
        what = f"{info.name} ({pixels}{info.embed_dim}-d, weights {info.weights_sha256[:12]})"
        encoders[role] = what, regime.sentence
        if role == run.roles[0]:
            samples, embedded_shards = sum(entry["rows"] for entry in embedded.values()), len(embedded)
            embedded_bytes = sum(shard.size for shard in run.shards if shard.name in embedded)
    sides = choose_sides(regimes)
    for name, what in run.passes(density=sides.density is not None)[len(run.roles) :]:
        recorded, parts = run.fingerprint_of(name), run.parts_of(name)
        done = len(Ledger(out, name, recorded).entries(parts)) if recorded else 0
        passes.append((name, what, done, len(parts)))
    return Plan(
        out=out,
        shards=len(names),
        bytes=sum(shard.size for shard in run.shards),
        samples=samples if embedded_shards else None,
        passes=passes,
        encoders=encoders,
        looked_for=sides.looked_for,
        not_looked_for=sides.not_looked_for,
        coverage=coverage(config) if sides.density else None,
        resources=config.resources.model_dump(mode="json", exclude_none=True),
        config=run.config.model_dump(mode="json"),
        needs=needs(run, infos, samples, embedded_bytes) if sized else (),
    )


def needs(run: Run, infos: Sequence[EncoderInfo], samples: int, of_bytes: int) -> tuple[tuple[str, str], ...]:
    """Say what a run takes by the cost model of `sizing`.

    Args:
        samples: that are known already, in `of_bytes` of the dump; 0 if none are.
    """
    config, total = run.config, sum(shard.size for shard in run.shards)
    source = "the shards that are embedded"
    if not samples:
        source = "the beginning of a shard"
        samples, of_bytes = _look_into(run)
    if not samples or not of_bytes or not total:
        return ()
    expected = round(samples * total / of_bytes)
    rule = config.suspicion
    searched = sizing.searched_rows(
        reference_size=rule.reference_size, banks=rule.banks, pool_size=rule.pool_size, candidates=rule.candidates
    )
    cpu = sizing.cpu_seconds(
        expected, width=max(info.embed_dim for info in infos), searched=searched, encoders=len(infos)
    )
    profiles = [sizing.encoder_profile(info.name) for info in infos]
    mparams = max((profile.mparams for profile in profiles if profile), default=0.0)
    memory = sizing.memory_bytes(NODE_CPUS, encoders=1, mparams=mparams, on_gpu=True)
    store = sizing.object_store_bytes(NODE_CPUS, encoders=1, image_size=max(info.image_size for info in infos))
    settings = [run.config.encoders[role] for role in run.roles]
    per_sample = [
        info.embed_dim * len(one.towers) * (2 if one.store == "float16" else 4)
        for info, one in zip(infos, settings, strict=True)
    ]
    written = sizing.result_bytes(expected, sum(per_sample))
    return (
        ("expected", f"{expected:,} samples, by {source}"),
        (
            "CPU time",
            f"{duration(cpu.low)} to {duration(cpu.high)} of one CPU without encoding, and {duration(sizing.BEGIN_S)}",
        ),
        ("encoding", _encoding(expected, infos)),
        ("a node", f"of {NODE_CPUS} CPUs and a GPU: {size(memory)} of memory and {size(store)} of object store"),
        ("room", f"{size(written)}" + (f" and {size(total)} of shards" if config.write.shards else "")),
    )


def _encoding(samples: int, infos: Sequence[EncoderInfo]) -> str:
    profiles = {info.name: sizing.encoder_profile(info.name) for info in infos}
    parts = []
    if gflop := sum(profile.gflop for profile in map(profiles.get, (info.name for info in infos)) if profile):
        cpu_s = sizing.encode_cpu_seconds(samples, gflop)
        gpu_s = sizing.gpu_seconds(samples, gflop, sizing.GPUS[NODE_GPU])
        parts.append(f"{duration(cpu_s)} of one CPU, or about {duration(gpu_s)} of one {NODE_GPU} (not measured)")
    if unknown := [name for name, profile in profiles.items() if not profile]:
        parts.append(f"not known for {' and '.join(unknown)}, counted as a small one")
    return "; ".join(parts)


def _look_into(run: Run) -> tuple[int, int]:
    """Return how many samples lie in how many bytes at the beginning of a shard; zeros if it cannot be told."""
    try:
        rows = next(iter(ReadShard(run.config.read, receipts=True)(run.shards[0])), None)
    except TarsiftError:
        return 0, 0
    if rows is None:
        return 0, 0
    offsets, sizes = rows["image_offset"].to_pylist(), rows["image_size"].to_pylist()
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True) if offset is not None]
    return (len(rows), max(ends)) if ends else (0, 0)


def coverage(config: CleanConfig) -> str:
    """Say which poison rates the density side covers."""
    return TRUSTED if config.reference.path else config.suspicion.coverage_sentence


def render_plan(plan: Plan, console: Console) -> None:
    """Print a plan for people."""
    console.print(f"[bold]{plan.headline}[/bold]", highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("pass", "what", "done"):
        table.add_column(title)
    for name, what, done, total in plan.passes:
        table.add_row(name, what, f"{done}/{total or '?'}")
    console.print(table, highlight=False)
    known = "not known before they are read" if plan.samples is None else f"{plan.samples:,} so far"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("samples", known)
    for role, (what, regime) in plan.encoders.items():
        facts.add_row(role, f"{what}. {regime}")
    for kind in plan.looked_for:
        facts.add_row("looks for", kind)
    for kind in plan.not_looked_for:
        facts.add_row("not for", kind)
    if plan.coverage:
        facts.add_row("coverage", plan.coverage)
    for what, figure in plan.needs:
        facts.add_row(what, figure)
    console.print(facts, highlight=False)
    console.print("settings", highlight=False)
    console.print(yaml.safe_dump(blanked(plan.config), sort_keys=False), highlight=False, markup=False)
