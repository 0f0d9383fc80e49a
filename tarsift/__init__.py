"""Find poisoned samples in image-text dumps and write a cleaned dump with the evidence.

The public face; everything here is loaded when it is first used, so that `import tarsift` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarsift.clip_detect.scores import SCORES
    from tarsift.clip_detect.suspicion import suspicion
    from tarsift.operators.encoder import ClipEncoder
    from tarsift.operators.images import DecodeImages
    from tarsift.operators.shards import ReadShard, list_shards
    from tarsift.pipelines.audit import audit
    from tarsift.pipelines.clean import clean
    from tarsift.pipelines.config import CleanConfig, load_config
    from tarsift.pipelines.evaluate import evaluate
    from tarsift.pipelines.export import export
    from tarsift.pipelines.ingest import ingest
    from tarsift.pipelines.notebook import notebook_progress
    from tarsift.pipelines.poison import poison
    from tarsift.pipelines.pretrain import pretrain
    from tarsift.pipelines.reading import read_shards
    from tarsift.pipelines.redo import redo
    from tarsift.pipelines.repair import repair
    from tarsift.pipelines.report.shown import flagged_groups, flagged_samples, gallery
    from tarsift.pipelines.score_dataset import score_dataset
    from tarsift.pipelines.skipping import drop_flagged, skip_flagged
    from tarsift.pipelines.trace import trace
    from tarsift.pipelines.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "SCORES": "clip_detect.scores",
    "suspicion": "clip_detect.suspicion",
    "ClipEncoder": "operators.encoder",
    "DecodeImages": "operators.images",
    "ReadShard": "operators.shards",
    "list_shards": "operators.shards",
    "audit": "pipelines.audit",
    "clean": "pipelines.clean",
    "CleanConfig": "pipelines.config",
    "load_config": "pipelines.config",
    "read_shards": "pipelines.reading",
    "evaluate": "pipelines.evaluate",
    "export": "pipelines.export",
    "ingest": "pipelines.ingest",
    "notebook_progress": "pipelines.notebook",
    "poison": "pipelines.poison",
    "pretrain": "pipelines.pretrain",
    "redo": "pipelines.redo",
    "repair": "pipelines.repair",
    "flagged_groups": "pipelines.report.shown",
    "flagged_samples": "pipelines.report.shown",
    "gallery": "pipelines.report.shown",
    "score_dataset": "pipelines.score_dataset",
    "drop_flagged": "pipelines.skipping",
    "skip_flagged": "pipelines.skipping",
    "trace": "pipelines.trace",
    "verify": "pipelines.verify",
}

__all__ = [
    "SCORES",
    "CleanConfig",
    "ClipEncoder",
    "DecodeImages",
    "ReadShard",
    "audit",
    "clean",
    "drop_flagged",
    "evaluate",
    "export",
    "flagged_groups",
    "flagged_samples",
    "gallery",
    "ingest",
    "list_shards",
    "load_config",
    "notebook_progress",
    "poison",
    "pretrain",
    "read_shards",
    "redo",
    "repair",
    "score_dataset",
    "skip_flagged",
    "suspicion",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tarsift' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"tarsift.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
