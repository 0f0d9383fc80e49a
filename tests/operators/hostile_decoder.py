"""A Pillow whose decoders do what a broken one may do, for processes that tests start; see `hostile`."""

from __future__ import annotations

from pathlib import Path

KILL, HANG, EAT = b"kill the decoder", b"hang the decoder", b"eat all memory"
LATER = b"kill the second decoder and all that follow"

SITE = f"""
import hashlib, os, re
import PIL.Image as image

really_open = image.open

def open(file, *arguments, **named):
    data = file.getvalue() if hasattr(file, "getvalue") else b""
    if {KILL!r} in data:
        os.kill(os.getpid(), 11)
    if {LATER!r} in data:
        mark = os.path.join(os.path.dirname(__file__), hashlib.sha256(data).hexdigest())
        if os.path.exists(mark):
            os.kill(os.getpid(), 11)
        os.close(os.open(mark, os.O_CREAT))
    if {HANG!r} in data:
        re.match(r"(a+)+$", "a" * 60 + "b")  # for ages, without letting another thread run
    if {EAT!r} in data:
        hold = [bytearray(1 << 28) for _ in range(1000)]
    return really_open(file, *arguments, **named)

image.open = open
"""


def hostile(folder: Path) -> str:
    """Return a PYTHONPATH with which every new Python gets such a Pillow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return str(folder)
