"""Room in the heap: a planned step asks for no page twice, and a cap, a limit or a tuned malloc leave it none."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is looked after")

STEPS = """
import resource
import torch
import graphplan
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(m for _ in range(8) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.GELU())), nn.Flatten())
x = torch.randn(16, 16, 96, 96)  # 9 MB, as each activation
loss_fn = lambda y: y.square().mean()
if {whole}:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, loss_fn, optimizer, "100%", x, time_limit=1)
else:
    planned = graphplan.optimize(model, "100%", x, loss_fn=loss_fn, time_limit=1)
    step = lambda x: loss_fn(planned(x)).backward()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x)
found = []
for _ in range(9):
    before = faults()
    step(x)
    found.append(faults() - before)
print(sorted(found)[4])  # the system may take idle pages in one of them
"""
FREED = """
import torch
from graphplan.heap import Room
def resident():
    line = next(s for s in open("/proc/self/status") if s.startswith("VmRSS:"))
    return int(line.split()[1]) // 1000
def freed():
    for _ in range(2):  # the first time they are mappings of their own
        some = [torch.ones(2_000_000) for _ in range(10)]
        del some
    return resident() - start
start = resident()
room = Room()
room.hold(100_000_000)
print(freed())
room.release()
print(resident() - start)
"""
ROOM = """
import gc
from graphplan.cap import Cap, data_bytes
from graphplan.heap import Room, tune_malloc
MB = 10**6
start = data_bytes()
def more():
    return round((data_bytes() - start) / MB, -2)
room = Room()
room.hold(400 * MB)
print(more())
room.hold(300 * MB)
print(more())
with Cap(200 * MB):
    print(more())
    room.hold(400 * MB)
    print(more())
room.hold(400 * MB)
print(more())
del room
gc.collect()
print(more())
tune_malloc()
room = Room()
room.hold(400 * MB)
print(more())
"""


def output_of(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return [int(float(line)) for line in done.stdout.split()]


@pytest.mark.parametrize("whole", [True, False], ids=["step", "halves"])
def test_a_planned_step_keeps_its_pages(whole: bool) -> None:
    (faults,) = output_of(STEPS.format(whole=whole))
    assert faults < 1000


def test_freed_tensors_stay_where_there_is_room() -> None:
    """80 MB at the top of the heap stay as long as the room, and go with it; without room it is glibc's luck."""
    with_room, gone = output_of(FREED)
    assert gone < 20 < 60 < with_room


def test_room_comes_and_goes() -> None:
    assert output_of(ROOM) == [800, 800, 0, 0, 800, 0, 0]  # twice what is held: addresses, not pages
