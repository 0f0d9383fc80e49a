"""One frozen model for the main job, filled from defaults, a YAML file, flags and `--set a.b=c`.

The parts stand beside the code they configure; this module only composes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from tarsift.clip_detect.mismatch import MismatchConfig
from tarsift.clip_detect.suspicion import SuspicionConfig
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.errors import ChangedError, ConfigError
from tarsift.operators.flag import FlagConfig
from tarsift.operators.shards import ReadConfig
from tarsift.operators.sift_settings import SiftConfig


class ReferenceConfig(BaseModel):
    """Where the reference comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[
        str | None,
        Field(description="trusted reference: Parquet files of an `embeddings/` folder; None draws one from the dump"),
    ] = None
    standing: Annotated[
        str | None,
        Field(description="standing reference of `tarsift ingest`: earlier samples that rules are fitted on as well"),
    ] = None
    rules: Annotated[
        Literal["fit", "keep"],
        Field(description="`keep` takes the rules that a standing reference has, where encoders and settings agree"),
    ] = "fit"
    key: Annotated[
        str | None, Field(description="key of the hash that draws it; None derives it from the digests of all shards")
    ] = None


class WriteConfig(BaseModel):
    """What is written besides lists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Annotated[
        bool, Field(description="write clean/, removed/ and errored/ shards; false writes only lists")
    ] = True


class ResourcesConfig(BaseModel):
    """How the work is spread. Nothing here changes a score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Annotated[
        int | None, Field(ge=1, description="encoders at once, and scorers on GPUs; None chooses from the cluster")
    ] = None
    gpus_per_worker: Annotated[
        float | None, Field(ge=0, description="GPU share of an encoder; None = 1 if there are GPUs")
    ] = None
    cpus_per_worker: Annotated[
        float | None, Field(gt=0, description="CPUs that a worker reserves; None = 0.2 to encode, 1 to score")
    ] = None
    threads: Annotated[int, Field(ge=1, description="threads of the mathematics in one worker")] = 1
    batch_size: Annotated[int, Field(ge=1, description="rows handed to a worker at once")] = 512
    wave_shards: Annotated[int, Field(ge=1, description="shards handed to Ray at once")] = 256
    stall_timeout_s: Annotated[
        float, Field(gt=0, description="seconds without any progress of a pass after which the run fails")
    ] = 270.0
    backend: Annotated[str, Field(description="neighbour search: auto, torch, faiss or faiss-gpu")] = "auto"


class CleanConfig(BaseModel):
    """All settings of `tarsift clean`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoders: Annotated[
        dict[str, EncoderConfig],
        Field(description="encoder per role: `detect` was trained on this dump, `witness` never saw it"),
    ] = {}
    read: ReadConfig = ReadConfig()
    images: ImageConfig = ImageConfig()
    reference: ReferenceConfig = ReferenceConfig()
    suspicion: SuspicionConfig = SuspicionConfig()
    mismatch: MismatchConfig = MismatchConfig()
    sift: SiftConfig = SiftConfig()
    flag: FlagConfig = FlagConfig()
    write: WriteConfig = WriteConfig()
    resources: ResourcesConfig = ResourcesConfig()
    max_error_rate: Annotated[
        float, Field(ge=0, le=1, description="share of errored samples over which the exit code is 3")
    ] = 1.0

    def with_sifted_score(self) -> CleanConfig:
        """Flag by the verdict of density and sifters where classes are sifted and no score is named."""
        if not self.sift.enabled or "score" in self.flag.model_fields_set:
            return self
        return self.model_copy(update={"flag": self.flag.model_copy(update={"score": "suspicion_sifted"})})

    def result_settings(self) -> dict[str, Any]:
        """Settings that the result depends on: everything but `resources`, as plain JSON values."""
        plain = self.model_dump(mode="json", exclude={"resources", "max_error_rate"})
        for encoder in plain["encoders"].values():
            for name in ("device", "threads"):
                encoder.pop(name, None)
        return plain


def load_config(file: str | None = None, settings: Iterable[str] = (), **flags: Any) -> CleanConfig:
    """Compose the configuration: defaults < YAML file < flags < `a.b=c` settings.

    Args:
        file: path or URL of a YAML mapping.
        settings: texts `a.b=c`; c is read as YAML.
        flags: dotted names (with `__` for the dot) to values; None = not given.

    Raises:
        ConfigError: for an unknown key (with the nearest known one) or a value out of range.
    """
    return parse_config(load_content(file, settings, **flags))


def load_content(file: str | None = None, settings: Iterable[str] = (), **flags: Any) -> dict[str, Any]:
    """Compose a plain mapping as `load_config` does, not yet checked against the models.

    Raises:
        ConfigError: for a file or a text that cannot be read.
    """
    content: dict[str, Any] = {}
    if file:
        try:
            loaded = yaml.safe_load(storage.read_bytes(file))
        except FileNotFoundError:
            raise ConfigError(f"config file {file} does not exist.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {file} is no valid YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"config file {file} must hold a mapping, got {type(loaded).__name__}.")
        content = loaded or {}
    for name, value in flags.items():
        if value is not None:
            put_setting(content, name.replace("__", "."), value, merge=True)
    for name, value in parse_settings(settings).items():
        put_setting(content, name, value, merge=True)
    return content


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Read texts `a.b=c`, c as YAML, into dotted names and values.

    Raises:
        ConfigError: for a text without `=`, or a value that is no YAML.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes name=value, got {text!r}; for example --set flag.value=0.02.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {name}: {value!r} is no valid YAML value.") from None
    return found


def parse_config(content: Mapping[str, Any]) -> CleanConfig:
    """Check a plain mapping against the models.

    Raises:
        ConfigError: one line per problem, with the nearest known name for an unknown key.
    """
    try:
        return CleanConfig.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError("; ".join(lines)) from None


def put_setting(content: dict[str, Any], name: str, value: Any, *, merge: bool = False) -> None:
    """Put a value under a dotted name into nested mappings, in place.

    Args:
        merge: whether a mapping is merged with one that is there, or replaces it.

    Raises:
        ConfigError: if the name goes through a value.
    """
    at = content
    *groups, last = name.split(".")
    for group in groups:
        at = at.setdefault(group, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{name}: {group} is a value, not a group of settings.")
    both = merge and isinstance(value, dict) and isinstance(at.get(last), dict)
    at[last] = {**at[last], **value} if both else value


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}, got {problem['input']!r}"
    known = [name for name, _ in all_settings()]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f"unknown setting {path}" + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")


def all_settings(model: type[BaseModel] = CleanConfig, prefix: str = "") -> Iterable[tuple[str, FieldInfo]]:
    """Yield dotted name and field of every setting."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if name == "encoders":
            yield from all_settings(EncoderConfig, "encoders.detect.")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from all_settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], *, out: str) -> None:
    """Compare two settings mappings.

    Raises:
        ChangedError: naming every setting that differs, both values, and what to do.
    """
    changes = [f"{name}: {old!r} -> {new!r}" for name, old, new in differences(before, after)]
    if changes:
        raise ChangedError(
            f"{out} was made with other settings: {'; '.join(changes)}. "
            "Give the same ones, another --out, or redo single passes with `tarsift score|sift|flag|write|report`."
        )


def differences(before: Any, after: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Yield (dotted name, old, new) of every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in sorted({*before, *after}):
            yield from differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif before != after:
        yield path, before, after
