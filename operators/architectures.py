"""Architectures by name: the JSON config that a CLIP is built from, read without loading what builds it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tarsift.operators import storage
from tarsift.operators.errors import UsageError

_CONFIG_FOLDER = resources.files("tarsift.operators") / "model_configs"
MODEL_CONFIGS: tuple[str, ...] = tuple(
    sorted(f.name.removesuffix(".json") for f in _CONFIG_FOLDER.iterdir() if f.name.endswith(".json"))
)


def model_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON config of a model: a shipped name, a path to a JSON file, or an open_clip name.

    Raises:
        UsageError: if there is no such model or file, or the file is no model config.
    """
    if isinstance(config, Mapping):
        return _checked_config(dict(config), "the config given")
    name = str(config)
    if name in MODEL_CONFIGS:
        return json.loads((_CONFIG_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if name.endswith(".json"):
        try:
            return _checked_config(json.loads(storage.read_bytes(name)), name)
        except FileNotFoundError as error:
            raise UsageError(f"there is no model config {name!r}.") from error
        except ValueError as error:
            raise UsageError(f"{name} is not a JSON file: {error}") from error
    import open_clip  # which takes seconds to load

    found = open_clip.get_model_config(name.replace("/", "-"))
    if found is None:
        raise UsageError(unknown_model(name))
    return found


def _checked_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    if "model_cfg" in config:  # the form of open_clip_config.json on the Hub
        config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise UsageError(f"{where} is no model config of open_clip: it lacks {', '.join(missing)}.")
    return config


def is_architecture(name: str) -> bool:
    """Tell whether a name is one of a model config."""
    if name in MODEL_CONFIGS or name.endswith(".json"):
        return True
    import open_clip

    return open_clip.get_model_config(name) is not None


def unknown_model(name: str) -> str:
    """Return what to say of a name that is none."""
    import open_clip

    close = difflib.get_close_matches(name, [*MODEL_CONFIGS, *open_clip.list_models()], n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else "See `open_clip.list_models()`."
    return (
        f"there is no model {name!r}: it is neither shipped ({', '.join(MODEL_CONFIGS)}) nor known to open_clip. {hint}"
    )
