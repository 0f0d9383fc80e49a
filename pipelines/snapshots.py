"""Snapshots of a training, beside the file that it is to make: the same command goes on from the last one.

A snapshot is one line of JSON, which says what it is of, and then a file of tensors. It is put whole or
not at all; nothing in it is executed. It goes with the training it is of: when that is done, or begins anew.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from tarsift.operators import storage
from tarsift.operators.checkpoints import tensors_in
from tarsift.operators.errors import ChangedError, UsageError
from tarsift.pipelines.config import differences

FORMAT = "tarsift-training"
VERSION = 1  # raised when a training of the same settings would go on to another result
MOST_OF_TIME = 1 / 20  # spent on writing them
_HEADER_BYTES = 1 << 20


class Snapshots:
    """The snapshot beside the file `out`, of a training with these settings: plain values, `steps` among them."""

    def __init__(self, out: str, settings: Mapping[str, Any], *, every_s: float = 60.0) -> None:
        self.url, self.every_s = f"{out}.part", every_s
        self.settings = json.loads(json.dumps(settings))
        self._next = time.monotonic() + every_s

    def step(self) -> int:
        """Return how many steps are done already, 0 where there is no snapshot; reads its first line only.

        Raises:
            ChangedError: if it is of a training with other settings; says which.
            UsageError: if there is a file of that name that is no snapshot.
        """
        if not storage.exists(self.url):
            return 0
        with storage.open_read(self.url) as file:
            return self._checked(file.readline(_HEADER_BYTES))

    def read(self) -> dict[str, Any] | None:
        """Return the state that was kept, None where there is none.

        Raises:
            UsageError: as `step` does.
            TarsiftError: if it is damaged.
        """
        if not storage.exists(self.url):
            return None
        file = io.BytesIO(storage.read_bytes(self.url))
        self._checked(file.readline(_HEADER_BYTES))
        return tensors_in(file.read(), self.url)

    def due(self) -> bool:
        """Tell whether the last one is old enough."""
        return time.monotonic() >= self._next

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Replace the snapshot by the state after `step` steps: tensors and plain types."""
        start = time.monotonic()
        header = {"format": FORMAT, "version": VERSION, "step": step, "settings": self.settings}
        with storage.open_write(self.url) as file:
            file.write(json.dumps(header).encode() + b"\n")
            torch.save(dict(state), file)
        end = time.monotonic()
        self._next = end + (max(self.every_s, (end - start) / MOST_OF_TIME) if self.every_s else 0.0)

    def remove(self) -> None:
        """Remove the snapshot; that there was none is fine."""
        storage.remove(self.url)

    def _checked(self, line: bytes) -> int:
        begin_anew = "--force begins anew"
        try:
            header = json.loads(line)
            if header["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self.url} is in the way: it is no snapshot of a training; {begin_anew}.") from None
        done = f"{self.url} keeps {header['step']} of {header['settings']['steps']} steps of a training"
        if header["version"] != VERSION:
            raise ChangedError(f"{done} by another version of tarsift: go on with that one; {begin_anew}.")
        changes = differences(header["settings"], self.settings)
        told = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changes)
        if told:
            raise ChangedError(
                f"{done} with other settings: {told}. Give the same ones to go on, or another --out; {begin_anew}."
            )
        return header["step"]
