"""How the C library hands out memory where a policy computes on a processor."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_TOP_PAD_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Keeps freed blocks for the next tensors, for this process from here on; returns whether the C library can.

    glibc maps every large block anew and gives it back when it is freed. A training step frees and asks for some
    gigabytes, and the kernel then clears each page again (benchmarks/README.md has what that costs).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _TOP_PAD_BYTES))
    answers = [mallopt(key, value) for key, value in settings]
    return answers == [1, 1, 1]
