"""Memory: pages that are given back, to the file or to the system, and arrays that JAX reads where they are."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

_RELEASE = 64 << 20  # bytes read after which the pages are given back
_PIECE = 4096  # rows that are looked at together
_ALIGNED = 64  # bytes: an array that begins elsewhere JAX copies before every program on a CPU
# None where the C library has no such function.
_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Pages:
    """The pages of the memory-mapped ones among some arrays."""

    def __init__(self, *arrays: Any):
        # Not of a private map (mode "c"): there the pages are all there is.
        self._maps: list[Any] = [vars(a)["_mmap"] for a in arrays if isinstance(a, np.memmap) and a.mode in ("r", "r+")]
        self._bytes = 0

    def read(self, *pieces: Any) -> None:
        """Note what was read; now and then, give it back."""
        self._bytes += sum(piece.nbytes for piece in pieces)
        if self._bytes > _RELEASE:
            self.release()

    def release(self) -> None:
        """Give all pages back."""
        for file in self._maps:
            file.madvise(mmap.MADV_DONTNEED)
        self._bytes = 0


def aligned(values: np.ndarray) -> np.ndarray:
    """The array itself, or a copy of it, at an address that JAX reads without a copy of its own."""
    if values.flags.c_contiguous and values.ctypes.data % _ALIGNED == 0:
        return values
    return gathered(values, np.arange(len(values)))


def gathered(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """values[indices], at such an address."""
    size = len(indices) * values[:1].nbytes
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    rows = memory[start : start + size].view(values.dtype).reshape(len(indices), *values.shape[1:])
    return np.take(values, indices, axis=0, out=rows, mode="clip")  # else it takes them to another place first


def trim() -> None:
    """Give freed memory back to the system: glibc keeps what arrays of up to 32 MB leave. Takes 10 to 60 ms."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def pieces(values: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Where each begins, and so many rows of an array that a memory-mapped file stays on disk."""
    pages = Pages(values)
    for start in range(0, len(values), _PIECE):
        piece = np.asarray(values[start : start + _PIECE])
        pages.read(piece)
        yield start, piece
