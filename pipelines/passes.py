"""The passes of a run: what they are called, what each does, and which settings its result depends on."""

from __future__ import annotations

from collections.abc import Iterable

from tarsift.operators.schema import SIFTED_SCORES
from tarsift.operators.sides import FEATURES

EMBED_DOES = "read, hash, decode and encode"
DOES = {
    "density": "score every sample against the reference",
    "score": "smooth over neighbours",
    "classes": "find classes among the captions",
    "route": "give every sample its class",
    "problems": "group classes that are far apart",
    "sifters": "sift the classes of each problem",
    "sift": "put the verdicts beside the scores",
    "flag": "find the cutoff and flag",
    "write": "copy every member to clean/, removed/ or errored/",
}
OF_SIFTING = ("classes", "route", "problems", "sifters", "sift")
AT_ONCE = ("classes", "problems")  # over all shards; the pass `sifters` goes problem by problem, all others by shard

# Settings that the result of a pass depends on beside those of the passes before it; that of embedding: all others.
SETTINGS_OF = {
    "score": ("reference", "suspicion", "mismatch"),
    "sift": ("sift", f"encoders.{FEATURES}"),
    "flag": ("flag",),
    "write": ("write",),
    "report": (),
}


def embed_name(role: str) -> str:
    """Return the name of the pass that embeds with the encoder of a role."""
    return f"embed.{role}"


def passes_of_score(score: str) -> tuple[str, ...]:
    """Return the passes that make the files a score is in."""
    return ("score", "sift") if score in SIFTED_SCORES else ("score",)


def passes_of(roles: Iterable[str], *, density: bool, sift: bool) -> list[tuple[str, str]]:
    """Return the passes of a run in their order, each with what it does.

    Args:
        roles: that have an encoder.
        density: whether samples are scored against a reference; sift: whether classes are sifted.
    """
    left_out = {*(() if density else ("density",)), *(() if sift else OF_SIFTING)}
    later = [(name, what) for name, what in DOES.items() if name not in left_out]
    return [(embed_name(role), EMBED_DOES) for role in roles] + later
