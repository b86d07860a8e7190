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
from graphplan.heap import Room
Room.allowed = {allowed}
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
before = faults()
for _ in range(3):
    step(x)
print((faults() - before) // 3)
"""
ROOM = """
import gc, resource
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
    (faults,) = output_of(STEPS.format(allowed=True, whole=whole))
    assert faults < 1000


def test_without_room_it_does_not() -> None:
    (faults,) = output_of(STEPS.format(allowed=False, whole=True))
    assert faults > 5000


def test_room_comes_and_goes() -> None:
    assert output_of(ROOM) == [800, 800, 0, 0, 800, 0, 0]  # twice what is held: addresses, not pages
