"""Weights lie beside the C library's heap, whatever was freed before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spf_kit import heap

COUNT = """
import ctypes
import torch
from spf_kit import heap

library, names = ctypes.CDLL("libc.so.6"), "arena ordblks smblks hblks hblkhd a b c d e".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
library.mallinfo2.restype = Info

def own():  # blocks outside of the heap
    return library.mallinfo2().hblks

def added(count):
    before = own()
    kept = [torch.empty(2**20, dtype=torch.uint8) for _ in range(count)]
    return own() - before

for _ in range(2):
    torch.empty(30 * 2**20, dtype=torch.uint8)  # freed at once: from here on, 1 MiB goes into the heap
print(added(100))
with heap.weights():
    print(added(400))  # the first of them fill what the others left free in the heap
print(added(100))
"""


@pytest.mark.skipif(
    heap._glibc() is None or not hasattr(heap._glibc(), "mallinfo2"),
    reason="another C library, or an old one",
)
def test_weights_lie_beside_the_heap() -> None:
    """In a process of its own: the limits are the process's."""
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    before, meanwhile, after = map(int, done.stdout.split())
    assert before == after == 0
    assert meanwhile > 200, "but for what still fits into the 130 that were freed"


STATUS = """
import ctypes
import sys
from pathlib import Path
from spf_kit import heap

if sys.argv[1:]:
    heap.keep_no_buffers()
import torch

torch.randn(300, 300) @ torch.randn(300, 300)
library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
print(library.mkl_serv_get_fast_mm_status() if hasattr(library, "mkl_serv_get_fast_mm_status") else "none")
"""


def test_products_keep_no_buffers() -> None:
    """As MKL itself says it."""

    def status(*words: str) -> str:
        command = [sys.executable, "-c", STATUS, *words]
        bare = {name: value for name, value in os.environ.items() if name != "MKL_DISABLE_FAST_MM"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=bare).stdout.strip()

    if status() == "none":
        pytest.skip("torch without MKL")
    assert status() == "0"
    assert status("none") == "1"
