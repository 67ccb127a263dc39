"""Memory stays in the process, in huge pages where the system has them: seen in processes of their own."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from idnerf import allocator

SCRIPT = """
import re, resource, sys, threading
from pathlib import Path
import numpy as np
from idnerf.allocator import keep_freed_memory

def status(name, path="/proc/self/status"):
    return int(re.search(name + r":\\s+(\\d+) kB", Path(path).read_text()).group(1)) // 1024

if sys.argv[1] != "none":
    kind = getattr(resource, sys.argv[1])
    resource.setrlimit(kind, (2**32, resource.getrlimit(kind)[1]))
before = status("VmData")
if sys.argv[2] == "on":
    assert keep_freed_memory()
print("reserved", status("VmData") - before)
print("resident", status("VmRSS"))

def fill():
    np.ones(200 * 2**17)  # 200 MiB

fill()
huge = Path("/proc/self/smaps_rollup")
print("huge", status("AnonHugePages", huge) if huge.exists() else -1)
for where in ("own", "other"):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        thread = threading.Thread(target=fill)
        thread.start() if where == "other" else fill()
        thread.join() if where == "other" else None
    print(where, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
SMALL_PAGES = 200 * 256
"""Of 4 kB in 200 MiB: the faults of filling so much anew."""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def measured(limit: str = "none", switch: str = "on") -> dict[str, int]:
    """Megabytes, and page faults; NumPy, which asks for huge pages by itself, does not."""
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, limit, switch]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return {name: int(number) for name, number in (line.split() for line in output.splitlines())}


def has_huge_pages() -> bool:
    """Whether a process that asks for them gets them at once."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    files = [folder / "enabled", folder / "defrag"]
    status = Path("/proc/self/status").read_text()
    if not all(file.exists() for file in files) or "THP_enabled:\t0" in status:
        return False
    return all(re.search(r"\[(always|madvise|defer\+madvise)\]", file.read_text()) for file in files)


def test_freed_memory_is_used_again_by_all_threads():
    kept, without = measured(), measured(switch="off")
    assert kept["own"] < SMALL_PAGES // 10 and kept["other"] < SMALL_PAGES // 10
    assert without["own"] > 10 * kept["own"] or without["huge"] > 0  # huge pages without asking: few faults anyway


@pytest.mark.skipif(not allocator._may_reserve(), reason="limits on address space, or other huge pages")
def test_the_heap_lies_in_huge_pages():
    kept, without = measured(), measured(switch="off")
    assert kept["reserved"] >= min(allocator.HEAP_IN_HUGE_PAGES, allocator._memory() // 2) // 2**20
    assert kept["resident"] < 300 and without["reserved"] == 0  # reserved, not taken
    if has_huge_pages() and kept["huge"] >= 0:
        assert kept["huge"] > 0


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_no_address_space_is_reserved_where_it_is_limited(limit):
    import resource

    hard = resource.getrlimit(getattr(resource, limit))[1]
    if hard != resource.RLIM_INFINITY and hard < 2**32:
        pytest.skip("a tighter limit already")
    found = measured(limit)
    assert found["reserved"] < 256 and found["own"] < SMALL_PAGES // 10


def test_a_system_without_the_calls_is_left_alone(monkeypatch):
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(allocator.ctypes, "CDLL", refuse)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
