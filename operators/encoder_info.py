"""What is known of an encoder besides its weights: read from the record in its file without loading torch.

An encoder file is a zip archive, as torch writes it. One member more, JSON, says what the file holds; torch passes it
over. Whoever encodes checks that the weights have the digest it names.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import TypeAdapter

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderInfo, is_file_alone, split_spec
from tarsift.operators.imported import folder_of, imported_info, open_folder

if TYPE_CHECKING:
    from tarsift.operators.towers import LoadedEncoder

RECORD = "extra/tarsift-encoder.json"  # below the folder that torch puts all into
RECORD_VERSION = 1


def encoder_info(spec: str) -> EncoderInfo:
    """Describe an encoder: its weights' digest, its sizes, what it was trained on.

    An encoder file of tarsift's own says all of it. Any other encoder is loaded once on the CPU and let go. Of
    `embeddings:FOLDER` only the folder is looked at; see `tarsift.operators.imported`.

    Raises:
        UsageError: if the model, the tag or the file does not exist, or they do not fit together.
        TarsiftError: if the file is damaged or holds more than tensors.
    """
    folder = folder_of(spec)
    if folder is not None:
        return imported_info(open_folder(folder))
    written = _read_record(spec)
    if written is not None:
        return written
    from tarsift.operators.models import load_encoder  # with torch and open_clip, which take seconds to load

    return info_of(load_encoder(spec))


def info_of(encoder: LoadedEncoder) -> EncoderInfo:
    """Describe an encoder that is loaded."""
    facts = {name: getattr(encoder, name) for name in EncoderInfo.__dataclass_fields__}
    return EncoderInfo(**{**facts, "name": short_name(encoder.name)})


def short_name(spec: str) -> str:
    """Leave out the folders of an encoder's file: `RN50:/models/cc3m.pt` is `RN50:cc3m.pt`."""
    if spec.startswith("hf-hub:"):
        return spec
    architecture, file = split_spec(spec)
    if file is None:
        return spec.rsplit("/", 1)[-1]
    return f"{architecture}:{file.rsplit('/', 1)[-1]}"


def add_record(file: BinaryIO, info: EncoderInfo) -> None:
    """Write the record into an encoder file that torch has just written, and that can be read back.

    The name is left out: it is that of the file, wherever that comes to lie.
    """
    facts = {"version": RECORD_VERSION, **asdict(info)}
    del facts["name"]
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(_member(archive), json.dumps(facts))


def _read_record(spec: str) -> EncoderInfo | None:
    """Return what an encoder file says of itself; None if it does not, or is none."""
    if not is_file_alone(spec) or not storage.exists(spec):
        return None
    try:
        with storage.open_read(spec) as file, zipfile.ZipFile(file) as archive:
            facts: Any = json.loads(archive.read(_member(archive)))
        if facts["version"] != RECORD_VERSION:
            return None
        return TypeAdapter(EncoderInfo).validate_python({**facts, "name": short_name(spec)})
    except (zipfile.BadZipFile, LookupError, TypeError, ValueError):
        return None  # what is wrong with a damaged file, its loading says


def _member(archive: zipfile.ZipFile) -> str:
    return f"{archive.namelist()[0].split('/', 1)[0]}/{RECORD}"
