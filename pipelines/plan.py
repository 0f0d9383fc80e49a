"""What a run will do, before it does it: shards, passes, resources and what it can and cannot see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tarsift.operators.regime import encoder_regime
from tarsift.operators.sides import choose_sides
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.embed import embed_fingerprint
from tarsift.pipelines.fitting import TRUSTED
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.passes import EMBED_DOES, embed_name
from tarsift.pipelines.run import open_run
from tarsift.pipelines.text import blanked, size


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        samples: of the shards that are embedded already; None while none is.
        passes: (name, what it does, shards done, shards in total); of sifting, problems, 0 before there is a plan.
        coverage: which poisoning rates the rule can see, as a sentence.
        encoders: per role (encoder, what is known of it and the dump).
        looked_for, not_looked_for: kinds of attack, if the encoders are what the roles say.
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

    @property
    def headline(self) -> str:
        done = self.passes[0][2]
        so_far = f", {done} of them embedded already" if done else ""
        return f"{self.shards} shards, {size(self.bytes)}{so_far} -> {self.out}"


def make_plan(inputs: str | Sequence[str], out: str, config: CleanConfig) -> Plan:
    """Plan a run without starting Ray; refuses what the run itself would refuse.

    Raises:
        UsageError, ChangedError: as `clean` would, before any work.
    """
    from tarsift.operators.encoder import encoder_info  # seconds to load, and `open_run` may refuse first

    run = open_run(inputs, out, config)
    names = run.names
    passes, encoders, regimes = [], {}, {}
    samples = embedded_shards = 0
    for role in run.roles:
        info = encoder_info(run.config.encoders[role].spec)
        name = embed_name(role)
        embedded = Ledger(out, name, embed_fingerprint(run.config, role, info)).entries(names)
        passes.append((name, EMBED_DOES, len(embedded), len(names)))
        complete = len(embedded) == len(names)
        digests = {name: entry["source"]["sha256"] for name, entry in embedded.items()} if complete else None
        regime = encoder_regime(info, digests)
        regimes[role] = regime.code if complete else None
        what = f"{info.name} ({info.image_size} px, {info.embed_dim}-d, weights {info.weights_sha256[:12]})"
        encoders[role] = what, regime.sentence
        if role == run.roles[0]:
            samples, embedded_shards = sum(entry["rows"] for entry in embedded.values()), len(embedded)
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
    )


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
    console.print(facts, highlight=False)
    console.print("settings", highlight=False)
    console.print(yaml.safe_dump(blanked(plan.config), sort_keys=False), highlight=False, markup=False)
