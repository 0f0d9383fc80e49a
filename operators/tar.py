"""A strict walk over a tar archive, for input that may be cut, damaged or made to mislead.

Python's `tarfile` takes a header that is cut short, or damaged in mid-archive, for the end of the
file, so that half of a shard can be missing without an error. Here every byte is accounted for:
headers must match their checksum, two zero blocks must end the archive, and what different tar
readers would read differently (a link with a payload, a global header that renames members, data
in the padding of a header) is damage: a model is trained on what `tarfile` reads. Formats: V7,
USTAR, GNU (long names, base-256 numbers, sparse, incremental), PAX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, NoReturn

BLOCK = 512
RECORD = 20 * BLOCK
ZEROS = bytes(BLOCK)
PIECE_BYTES = 1 << 20
MAX_EXTENDED_BYTES = 1 << 20  # of one extended header
MAX_HEADERS_BYTES = 4 * MAX_EXTENDED_BYTES  # of all the headers of a member
MAX_SIZE = 1 << 60

# typeflag -> type of member; what is not named here is "other". GNU's L and K and PAX's x and g are no members.
TYPES = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "link",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "fifo",
    b"S": "sparse",
}
WITHOUT_PAYLOAD = frozenset({"link", "symlink", "device", "directory", "fifo"})
EXTENDED = frozenset({b"L", b"K", b"x", b"X", b"g"})
WITHOUT_PREFIX = frozenset({b"S", b"L", b"K"})
COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Any member may come first in an archive that is written, and by these bytes a reader would unpack it instead:
# gzip, bzip2, lzma, xz, zstd.
_LIKE_COMPRESSED = rb"\x1f\x8b\x08|BZh.1AY&SY|\]\0\0\x80|\xfd7zXZ|\x28\xb5\x2f\xfd"
# A header as nearly all writers make it, with size and checksum; others are looked at field by field.
_USUAL_HEADER = re.compile(
    rb"(?s)(?!" + _LIKE_COMPRESSED + rb").{100}[0-7]{7}[ \0][0-7]{7}[ \0][0-7]{7}[ \0]([0-7]{11})[ \0][0-7]{11}[ \0]"
    rb"([0-7]{6})\0 .{173}(?:\0{16}|[0-7]{7}[ \0][0-7]{7}[ \0])"
)
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_SPARSE_NUMBERS = (*((at, at + 12) for at in range(386, 482, 12)), (483, 495))
_GNU_TIME = re.compile(rb"[0-7]{11}\0")
_RECORD_START = re.compile(rb"([1-9][0-9]{0,8}) ")


class Member(NamedTuple):
    """A member of an archive; offsets count from the archive's first byte, after decompression."""

    name: str  # UTF-8; bytes that are not are surrogates
    type: str  # file, directory, link, symlink, device, fifo, sparse, global, other
    header_offset: int  # first byte of the first of its headers
    headers: bytes  # all its header blocks, extended ones with their payloads
    offset: int  # first byte of its payload
    size: int  # bytes of payload in the archive
    payload: bytes | None  # as many leading bytes as were asked for, None = none were


class TarDamage(Exception):
    """An archive that cannot be read on: `problem` is one of `errors.SHARD_PROBLEMS`.

    `offset` is the first byte that belongs to no whole member. Where the headers of a member were
    read but its payload is cut, `member` is that one.
    """

    def __init__(self, problem: str, offset: int, detail: str, member: Member | None = None) -> None:
        super().__init__(problem, offset, detail, member)
        self.problem, self.offset, self.detail, self.member = problem, offset, detail, member

    def __str__(self) -> str:
        return f"{self.problem} at byte {self.offset}: {self.detail}"


def no_payload(name: str, size: int) -> int:
    """Ask for no payload of any member."""
    return 0


def walk_tar(stream: BinaryIO, *, keep: Callable[[str, int], int] = no_payload) -> Iterator[Member]:
    """Yield the members of an archive in order, each once its last byte has been read.

    The stream is only read, in pieces of bounded size, and to its end. `keep(name, size)` says how many
    leading bytes of a plain file's payload to hand over; the rest is skipped without being held.

    Raises:
        TarDamage: after the last whole member, if anything is wrong with the archive.
    """
    offset = 0
    while True:
        start = offset
        blocks: list[bytes] = []
        extended: dict[str, bytes] = {}
        while True:
            block = _read(stream, BLOCK)
            if len(block) < BLOCK:
                _ended(start, offset, block)
            if block == ZEROS:
                if blocks:
                    raise TarDamage("bad_header", start, "an extended header with no member after it")
                _check_end(stream, offset + BLOCK)
                return
            name, kind, size = _parse_header(block, start)
            blocks.append(block)
            offset += BLOCK
            if kind not in EXTENDED:
                break
            padded = _read_extended(stream, size, start)
            if kind == b"g":
                if len(blocks) > 1:
                    raise TarDamage("bad_header", start, "a global header between a member's extended headers")
                _check_global(padded[:size], start)
                yield Member(_text(name), "global", start, block, offset, size, None)
                start = offset = offset + len(padded)
                blocks.clear()
                continue
            blocks.append(padded)
            offset += len(padded)
            if offset - start > MAX_HEADERS_BYTES:
                raise TarDamage("bad_header", start, f"the headers of a member have over {MAX_HEADERS_BYTES} bytes")
            # Of two that set the same, the first counts, as in tarfile.
            for key, value in _parse_extended(kind, padded[:size], start).items():
                extended.setdefault(key, value)

        type = TYPES.get(kind, "other")
        if kind == b"\0" and name.endswith(b"/"):
            type = "directory"
        if extended:
            name, type, size = _override(name, kind, type, size, extended, start)
        if kind == b"S" and block[482]:
            offset += _read_sparse_map(stream, blocks, start)
        if size and type in WITHOUT_PAYLOAD:
            raise TarDamage(
                "bad_header", start, f"a {type} with a payload of {size} bytes, which tar readers disagree on"
            )

        text = _text(name)
        wanted = min(keep(text, size), size) if type == "file" else -1
        headers = block if len(blocks) == 1 else b"".join(blocks)
        payload, got = _read_payload(stream, size, wanted)
        if got < _padded(size):
            cut = Member(text, type, start, headers, offset, size, None)
            raise TarDamage("truncated", start, f"the file ends inside the member {text!r}", cut)
        yield Member(text, type, start, headers, offset, size, payload)
        offset += got


def end_archive(written: int) -> bytes:
    """Return what ends an archive of `written` bytes: two zero blocks, and zeros to a multiple of 10240 bytes."""
    return bytes(2 * BLOCK + -(written + 2 * BLOCK) % RECORD)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _read(stream: BinaryIO, size: int) -> bytes:
    # A short read is no end of file: pipes and raw files give what they have.
    data = stream.read(size)
    if len(data) == size or not data:
        return data
    pieces = [data]
    missing = size - len(data)
    while missing and (data := stream.read(missing)):
        pieces.append(data)
        missing -= len(data)
    return b"".join(pieces)


def _read_extended(stream: BinaryIO, size: int, start: int) -> bytes:
    """Read the payload of an extended header, and its padding, which must be zeros: tarfile parses it too."""
    if size > MAX_EXTENDED_BYTES:
        raise TarDamage("bad_header", start, f"an extended header of {size} bytes is too large")
    padded = _read(stream, _padded(size))
    if len(padded) < _padded(size):
        raise TarDamage("truncated", start, "the file ends inside an extended header")
    if padded.count(0, size) != len(padded) - size:
        raise TarDamage("bad_header", start, "data in the padding of an extended header, which tar readers disagree on")
    return padded


def _override(
    name: bytes, kind: bytes, type: str, size: int, extended: dict[str, bytes], start: int
) -> tuple[bytes, str, int]:
    """Return name, type and size of a member as its extended headers have them."""
    path = extended.get("path", name)
    # Which of its names makes a member of the old type a folder, whose payload is not skipped, depends on the reader.
    if kind == b"\0" and path.endswith(b"/") != name.endswith(b"/"):
        raise TarDamage("bad_header", start, "a folder by one of its names only, which tar readers disagree on")
    if "size" in extended:
        size = _decimal(extended["size"], start)
    if "sparse" in extended and "size" in extended:  # tarfile may skip as many bytes as the holes would fill
        raise TarDamage("bad_header", start, "a sparse member with a size of its own, which tar readers disagree on")
    if "sparse" in extended and type == "file":
        type = "sparse"
    return path, type, size


def _read_payload(stream: BinaryIO, size: int, wanted: int) -> tuple[bytes | None, int]:
    """Read a payload and its padding; return its first `wanted` bytes and how many bytes were there."""
    padded = _padded(size)
    if wanted == size or padded <= PIECE_BYTES:
        data = _read(stream, padded)
        return (data[:wanted] if wanted > 0 or wanted == size else None), len(data)
    payload = _read(stream, wanted) if wanted > 0 else None
    got = len(payload or b"")
    while got < padded and (data := stream.read(min(PIECE_BYTES, padded - got))):
        got += len(data)
    return payload, got


def _ended(start: int, offset: int, rest: bytes) -> NoReturn:
    if rest.strip(b"\0") or offset > start:
        raise TarDamage("truncated", start, "the file ends inside a header")
    at = start + len(rest)
    raise TarDamage("no_end_marker", at, "the file ends where a header or two zero blocks should follow")


def _check_end(stream: BinaryIO, offset: int) -> None:
    second = _read(stream, BLOCK)
    if second != ZEROS:
        if second.strip(b"\0"):
            raise TarDamage("no_end_marker", offset, "one zero block with data after it, where two end an archive")
        raise TarDamage("no_end_marker", offset + len(second), "the file ends after one zero block; two end an archive")
    offset += BLOCK
    while piece := stream.read(PIECE_BYTES):
        if piece.count(0) != len(piece):
            at = offset + len(piece) - len(piece.lstrip(b"\0"))
            raise TarDamage("trailing_data", at, "data after the two zero blocks that end the archive")
        offset += len(piece)


def _parse_header(block: bytes, start: int) -> tuple[bytes, bytes, int]:
    """Return name, typeflag and size of a header whose checksum fits.

    The field of the checksum itself counts as eight spaces; some old writers summed signed bytes.
    """
    usual = _USUAL_HEADER.match(block)
    size, stated = (int(usual[1], 8), int(usual[2], 8)) if usual else (_number(block[124:136]), _number(block[148:156]))
    total = sum(block.translate(None, b"\0")) - sum(block[148:156]) + 256
    if stated != total:
        rest = block[:148] + block[156:]
        if stated is None or stated != total - 256 * sum(byte > 127 for byte in rest):
            _refuse_header(block, start)
    kind = block[156:157]
    if size is None or size > MAX_SIZE:
        raise TarDamage("bad_header", start, f"the size of a member is out of range: {block[124:136]!r}")
    if not usual or kind == b"S":
        _check_unusual(block, kind, start)
    name = block[:100].partition(b"\0")[0]
    magic = block[257:263]
    if magic != b"ustar\0" and magic != b"ustar " and magic != b"\0\0\0\0\0\0":
        raise TarDamage("bad_header", start, f"an unknown tar format: its magic is {magic!r}")
    if block[345] and kind not in WITHOUT_PREFIX:
        name = _prefixed(name, block, start)
    return name, kind, size


def _prefixed(name: bytes, block: bytes, start: int) -> bytes:
    """Return a name with the prefix that only USTAR has; tarfile puts one before the names of every format."""
    if block[257:263] == b"ustar\0":
        if not name and block[156] == 0:
            raise TarDamage("bad_header", start, "a folder by its prefix only, which tar readers disagree on")
        return block[345:500].partition(b"\0")[0] + b"/" + name
    # Incremental archives of GNU tar have times there, which as a folder do not change what a file is, but for `.jpg`.
    if block[257:263] == b"ustar " and _GNU_TIME.match(block, 345) and (b"/" in name or not name.startswith(b".")):
        return name
    raise TarDamage("bad_header", start, "a prefix of the name in a format without, which tar readers disagree on")


def _check_unusual(block: bytes, kind: bytes, start: int) -> None:
    """Refuse a header that begins like a compressed file, or has a number that tarfile cannot read.

    tarfile takes such a number for the end of the archive.
    """
    if re.match(b"(?s)" + _LIKE_COMPRESSED, block):
        raise TarDamage("bad_header", start, f"a name that begins like a compressed file: {block[:10]!r}")
    for at, end in (*_NUMBERS, *_SPARSE_NUMBERS) if kind == b"S" else _NUMBERS:
        _check_number(block[at:end], start)


def _check_number(field: bytes, start: int) -> None:
    if field[0] in (0x80, 0xFF):  # base-256
        return
    try:
        int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)
    except ValueError:
        raise TarDamage("bad_header", start, f"a header with {field!r} where a number should be") from None


def _refuse_header(block: bytes, start: int) -> NoReturn:
    for magic, format in COMPRESSED.items():
        if start == 0 and block.startswith(magic):
            raise TarDamage(
                "bad_header", start, f"the file is compressed with {format}; only plain tar and gzip are read"
            )
    raise TarDamage("bad_header", start, "a header does not match its checksum")


def _number(field: bytes) -> int | None:
    """Return the number in a header field, octal or base-256; None if there is none or it is negative.

    Digits end at the first NUL: some readers see no more, others go on.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits, _, rest = field.partition(b"\0")
    if rest.strip(b" \0"):
        return None
    digits = digits.strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _decimal(value: bytes, start: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise TarDamage("bad_header", start, f"the size in a PAX header is out of range: {value[:40]!r}")
    return int(value)


def _parse_extended(kind: bytes, data: bytes, start: int) -> dict[str, bytes]:
    """Return what an extended header says of the next member: path, size, and whether it is sparse."""
    if kind == b"L":
        return {"path": data.partition(b"\0")[0]}
    if kind == b"K":  # the target of a link
        return {}
    found: dict[str, bytes] = {}
    for key, value in _pax_records(data, start).items():
        if key in (b"path", b"GNU.sparse.name"):  # of both the later counts, as in tarfile
            if b"\0" in value:
                raise TarDamage("bad_header", start, "a PAX path holds a NUL character")
            found["path"] = value
        elif key == b"size":
            found["size"] = value
        if key.startswith(b"GNU.sparse."):
            found["sparse"] = b""
    return found


def _check_global(data: bytes, start: int) -> None:
    # tarfile would give this path or size to every member that follows; no writer makes such a thing.
    for key in _pax_records(data, start):
        if key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.sparse."):
            raise TarDamage("bad_header", start, f"a global header sets {_text(key)!r} for all members")


def _pax_records(data: bytes, start: int) -> dict[bytes, bytes]:
    """Return the records `<length> <key>=<value>\\n` of a PAX header; the last of a key counts."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:  # some writers pad with zeros
        match = _RECORD_START.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            raise TarDamage("bad_header", start, f"a PAX record of wrong length: {data[at : at + 40]!r}")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals or not key:
            raise TarDamage("bad_header", start, f"a PAX record with no key: {data[at : at + 40]!r}")
        records[key] = value
        at = end
    return records


def _read_sparse_map(stream: BinaryIO, blocks: list[bytes], start: int) -> int:
    """Read the blocks that continue the map of an old GNU sparse member; return how many bytes they are."""
    read = 0
    more = True
    while more:
        block = _read(stream, BLOCK)
        if len(block) < BLOCK:
            raise TarDamage("truncated", start, "the file ends inside the header of a sparse member")
        for at in range(0, 504, 12):
            _check_number(block[at : at + 12], start)
        blocks.append(block)
        read += BLOCK
        if read > MAX_EXTENDED_BYTES:
            raise TarDamage("bad_header", start, f"the map of a sparse member has over {MAX_EXTENDED_BYTES} bytes")
        more = bool(block[504])
    return read
