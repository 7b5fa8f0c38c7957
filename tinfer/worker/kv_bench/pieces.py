"""memcpy of scattered pieces in one C loop: the fastest that one thread can copy just these bytes.

The loop is compiled when it is needed, by the C compiler that there is; without one the baseline is
left out.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tinfer.worker.kv.geometry import Int64Array

_SOURCE = """
#include <stdint.h>
#include <string.h>
void copy_pieces(char *dst, const char *src, const int64_t *dst_offsets,
                 const int64_t *src_offsets, const int64_t *sizes, int64_t num) {
    for (int64_t i = 0; i < num; i++)
        memcpy(dst + dst_offsets[i], src + src_offsets[i], sizes[i]);
}
"""

# (address to, address from, offsets to, offsets from, sizes)
CopyPieces = Callable[[int, int, Int64Array, Int64Array, Int64Array], None]


def compiled() -> CopyPieces | None:
    """The loop; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="tinfer-pieces-") as name:
        source, library = Path(name) / "pieces.c", Path(name) / "pieces.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None
        # Once loaded it needs its file no more.
        function = ctypes.CDLL(str(library)).copy_pieces
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64]
    function.restype = None

    def copy(dst: int, src: int, to: Int64Array, of: Int64Array, sizes: Int64Array) -> None:
        function(dst, src, to.ctypes.data, of.ctypes.data, sizes.ctypes.data, len(sizes))

    return copy
