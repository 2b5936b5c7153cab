"""Freed memory stays in the process: counted are the page faults of a block that is used a second time."""

import subprocess
import sys

import pytest

from isoprune_hf.cli import memory

BLOCK = 32 * 2**20
SCRIPT = f"""
import ctypes, resource, runpy, sys
is_kept = runpy.run_path(sys.argv[1])["keep_freed_memory"]() if sys.argv[2] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 2**17) if sys.argv[2] == "default" else None  # else the threshold grows with the blocks freed
counts = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc({BLOCK})
    ctypes.memset(block, 1, {BLOCK})
    libc.free(block)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(is_kept), *counts)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")


def run(kind: str, **variables: str) -> tuple[bool, int, int]:
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, memory.__file__, kind]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    is_kept, first, second = map(int, done.stdout.split())
    return bool(is_kept), first, second


@linux
def test_block_used_again_faults_in_no_page() -> None:
    is_kept, first, second = run("keep")
    assert is_kept and 4 * second < first
    _, first, second = run("default")
    assert 2 * second > first  # the block was given back


@linux
@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_thresholds_of_user_stay(name: str) -> None:
    assert not run("keep", **{name: "131072"})[0]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
