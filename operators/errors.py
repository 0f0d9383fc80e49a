"""The exceptions tarsift raises and the reason codes a row can carry.

::

    TarsiftError                 exit code 1
    ├── UsageError               exit code 2: wrong arguments, found before work starts
    │   ├── ConfigError          a setting is unknown or out of range
    │   └── ChangedError         inputs or settings differ from those of the run being continued
    ├── ShardError               a shard cannot be read as the policy demands
    ├── AccessError              a store, or the permissions of a file, refuse what a run needs
    ├── ConservationError        read != kept + removed + errored: a defect, never ignored
    ├── ErrorRateError           exit code 3: complete, but more bad samples than allowed
    └── Interrupted              exit code 75: run the same command again
        ├── StoreError           a store did not answer for minutes, or a shard could not be read for a while
        ├── BusyError            another run works on the same result folder
        └── FencedError          another run took over this one's result folder
"""

from __future__ import annotations

AGAIN = "what was committed is kept; run the same command again to go on."
EXIT_CODES = {"done": 0, "failed": 1, "usage": 2, "error_rate": 3, "findings": 4, "interrupted": 75}


class TarsiftError(Exception):
    """Base of all errors that tarsift raises on purpose; `exit_code` is what the command line returns."""

    exit_code = EXIT_CODES["failed"]


class UsageError(TarsiftError):
    """Wrong arguments: one line that says what was wrong, the value seen and what to do."""

    exit_code = EXIT_CODES["usage"]


class ConfigError(UsageError):
    """A setting is unknown or out of range."""


class ChangedError(UsageError):
    """Inputs or settings differ from those of the run that is being continued."""


class ShardError(TarsiftError):
    """A shard cannot be read and the policy does not allow to go on without it."""


class AccessError(TarsiftError):
    """A store, or the permissions of a file, refuse what a run needs."""


class ConservationError(TarsiftError):
    """Samples read and samples written do not agree."""


class ErrorRateError(TarsiftError):
    """The run is complete, but the share of bad samples is over `max_error_rate`."""

    exit_code = EXIT_CODES["error_rate"]


class Interrupted(TarsiftError):
    """The run was asked to stop; the same command goes on from here."""

    exit_code = EXIT_CODES["interrupted"]


class StoreError(Interrupted):
    """A store did not answer for longer than requests are tried again, or what holds a shard cannot give it now."""


class BusyError(Interrupted):
    """Another run works on the same result folder; run the same command again when it has ended."""


class FencedError(Interrupted):
    """Another run took over this one's result folder while it did not answer."""


# Reason codes of the column `error`. A row has at most one; a reason that leaves no usable
# image replaces one that does.
REASONS: dict[str, str] = {
    "missing_image": "no member with an image extension",
    "undecodable_image": "the image member is not a whole image of a supported format",
    "decoder_died": "the image killed its decoder, or was not decoded within `timeout_s`",
    "image_too_large": "the image member has more bytes than `max_image_bytes`",
    "too_many_pixels": "the image has more pixels than `max_pixels`",
    "several_images": "more than one image; the first of `jpg`, `png`, `jpeg`, `webp` is scored, as open_clip takes it",
    "missing_caption": "no caption member or json field",
    "caption_not_utf8": "the caption is not valid UTF-8; it is kept with replacement characters",
    "caption_too_large": "the caption has more bytes than `max_caption_bytes`; it is cut",
    "bad_json": "the json member is not a JSON object",
    "duplicate_key": "an earlier sample of the shard has the same key",
    "scattered_sample": "members of an earlier sample, too far behind it to be joined",
    "unsupported_member": "a link, device or other member that is not a plain file",
    "truncated_member": "the shard ends inside this sample",
    "no_embedding": "embeddings made elsewhere were given, and this sample has none among them",
}

# Reasons that leave the image usable: such a row is still embedded and scored.
IMAGE_USABLE = frozenset(
    {"several_images", "missing_caption", "caption_not_utf8", "caption_too_large", "bad_json", "duplicate_key"}
)

# What can be wrong with a whole shard; a shard with a problem is salvaged, quarantined or fails the run.
SHARD_PROBLEMS: dict[str, str] = {
    "truncated": "the file ends inside a member or a header",
    "bad_header": "a header does not match its checksum or cannot be parsed; nothing after it is read",
    "no_end_marker": "the two zero blocks that end an archive are missing",
    "trailing_data": "bytes other than zero follow the end of the archive",
    "gzip_damage": "the gzip stream is damaged or cut",
    "unreadable": "the file cannot be opened or read",
}

# `error` of the one row (row = -1) by which a reader reports that a shard is finished.
END_OF_SHARD = "end_of_shard"
