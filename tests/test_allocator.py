"""Memory stays in the process, in huge pages where the system has them: seen in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from idnerf import allocator

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import re, resource, sys, threading
from pathlib import Path
import numpy as np
from idnerf.allocator import keep_freed_memory

def status(name, path):
    return int(re.search(name + r":\\s+(\\d+) kB", Path(path).read_text()).group(1)) // 1024

LIMITS = {"none": (), "address": ("RLIMIT_AS",), "data": ("RLIMIT_DATA",)}
for name in LIMITS[sys.argv[1]]:
    resource.setrlimit(getattr(resource, name), (2**32, resource.RLIM_INFINITY))
print("kept", keep_freed_memory())
print("reserved", status("VmData", "/proc/self/status"))
print("resident", status("VmRSS", "/proc/self/status"))
def fill():
    np.ones(200 * 2**17)  # 200 MiB
fill()
print("huge", status("AnonHugePages", "/proc/self/smaps_rollup"))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
other = threading.Thread(target=fill)
other.start()
other.join()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's allocator")


def measured(limit: str) -> dict[str, str]:
    command = [sys.executable, "-c", SCRIPT, limit]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(line.split() for line in output.splitlines())
    if found["kept"] == "False":
        pytest.skip("not glibc")
    return found


def test_freed_memory_is_used_again_by_all_threads_and_lies_in_huge_pages():
    found = measured("none")
    assert int(found["faults"]) < 5000  # 200 MiB are 51,200 pages
    if allocator._may_reserve():
        expected = min(allocator.HEAP_IN_HUGE_PAGES, allocator._memory() // 2) // 2**20
        assert int(found["reserved"]) >= expected
        assert int(found["resident"]) < 300  # reserved, not taken
        if re.search(r"\[(always|madvise)\]", HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""):
            assert int(found["huge"]) >= 100  # where memory is in pieces, fewer than the 200 that would fit


@pytest.mark.parametrize("limit", ["address", "data"])
def test_no_address_space_is_reserved_where_it_is_limited(limit):
    found = measured(limit)
    assert int(found["reserved"]) < 2048 and int(found["faults"]) < 5000


def test_a_system_without_the_calls_is_left_alone(monkeypatch):
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(allocator.ctypes, "CDLL", refuse)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    assert allocator._memory() >= os.sysconf("SC_PAGE_SIZE")
