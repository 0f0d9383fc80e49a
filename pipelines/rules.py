"""The files that fitted rules are kept in: plain arrays and a JSON-able mapping, without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tarsift.operators import storage


def rule_file(out: str, name: str) -> str:
    """Return where a rule is kept."""
    return storage.join(out, "reference", f"{name}.npz")


def save_arrays(url: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Save plain arrays and a JSON-able mapping as one npz without pickle."""
    sink = io.BytesIO()
    everything: dict[str, Any] = {"__about__": np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays}
    np.savez(sink, **everything)
    storage.put_bytes(url, sink.getvalue())


def load_arrays(url: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load what `save_arrays` saved."""
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(arrays.pop("__about__").tobytes())
