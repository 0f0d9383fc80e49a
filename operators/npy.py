"""Arrays in `.npy` files, a part at a time: written block by block without knowing how many, and read row by row."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from tarsift.operators import storage
from tarsift.operators.errors import UsageError

GAP_ROWS = 64  # rows that are read and not wanted, rather than asked for in two requests


class NpyFile:
    """A `.npy` file that is written block by block; it appears when `stack` is left, if it is left well.

    Args:
        url: where it is to be.
        dtype: of the array.
        row: shape of one row, () for an array of one dimension.
        stack: that closes it.
    """

    def __init__(self, url: str, dtype: np.dtype, row: tuple[int, ...], stack: ExitStack) -> None:
        self._dtype, self._row = dtype, row
        self._file: BinaryIO = stack.enter_context(storage.open_write(url))
        self.rows = 0
        self._put_header()
        stack.callback(self._put_header)  # before the file is closed and put in its place

    def _put_header(self) -> None:
        """Write the header for the rows so far; numpy leaves room in it for any length."""
        self._file.seek(0)
        about = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.rows, *self._row)}
        npy.write_array_header_1_0(self._file, about)

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        if rows.shape[1:] != self._row:
            raise ValueError(f"rows of shape {rows.shape[1:]} do not fit to those of shape {self._row} before")
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.rows += len(rows)


@dataclass(frozen=True)
class NpyHeader:
    """A matrix in a `.npy` file: its shape, the type of its numbers, and where the first of them stands."""

    url: str
    rows: int
    columns: int
    dtype: str
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.columns * np.dtype(self.dtype).itemsize


def read_header(url: str) -> NpyHeader:
    """Look at a `.npy` file of embeddings; nothing in it is run or unpickled.

    Raises:
        UsageError: if it is no matrix of floating-point numbers, stored row by row, or is cut.
    """
    with storage.open_read(url) as file:
        try:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
            offset = file.tell()
            size = file.seek(0, 2)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{url} is no .npy file that can be read: {error}") from None
    if len(shape) != 2 or fortran or dtype.kind != "f":
        raise UsageError(f"{url} holds no embeddings, a row each: its shape is {shape}, its type {dtype}.")
    header = NpyHeader(url, shape[0], shape[1], dtype.str, offset)
    if size < offset + header.rows * header.row_bytes:
        raise UsageError(f"{url} is cut: it says that it has {header.rows} rows, and has {size} bytes.")
    return header


def read_rows(header: NpyHeader, rows: np.ndarray) -> np.ndarray:
    """Return rows (m,) of a matrix as an (m, d) array; those that lie close together are read in one go."""
    wanted, back = np.unique(rows, return_inverse=True)
    spans = np.split(wanted, np.flatnonzero(np.diff(wanted) > GAP_ROWS) + 1)
    parts = []
    with storage.open_read(header.url) as file:
        for span in filter(len, spans):
            file.seek(header.offset + int(span[0]) * header.row_bytes)
            data = file.read((int(span[-1] - span[0]) + 1) * header.row_bytes)
            matrix = np.frombuffer(data, header.dtype).reshape(-1, header.columns)
            parts.append(matrix[span - span[0]])
    if not parts:
        return np.empty((0, header.columns), header.dtype)
    return np.concatenate(parts)[back]
