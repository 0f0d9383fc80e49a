"""Arrays to `.npy` files, block by block: for arrays whose length nobody knows before the last block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from tarsift.operators import storage


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
