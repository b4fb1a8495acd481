"""Huge pages change where numbers lie, and never what they are."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from moekit.checkpoint import weights
from moekit.checkpoint.header import read_header
from moekit.kernels.linear import Linear
from moekit.moe.experts import Experts
from moekit.tensors import memory
from moekit.tensors.memory import (
    HUGE,
    in_huge_pages,
    map_huge_pages,
    memory_bytes,
    move_to_huge_pages,
    prefer_huge_pages,
    spare_bytes,
)
from moekit.train.adamw import AdamW
from moekit.train.precision import MasterWeights

KNOWN = HUGE is not None and Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file()
needs_huge_pages = pytest.mark.skipif(not KNOWN, reason="this system has no huge pages")


def test_mapped_files_keep_their_bytes_and_say_whether_the_system_knows_huge_pages(tmp_path: Path) -> None:
    path, numbers = tmp_path / "numbers", torch.arange(1 << 20, dtype=torch.int32)
    path.write_bytes(numbers.numpy().tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        known = map_huge_pages([memory])
        assert HUGE is not None or not known
        assert memory[:] == numbers.numpy().tobytes()


@pytest.mark.parametrize("has_room", [True, False])
def test_weights_are_those_of_the_file_whether_or_not_it_fits_into_memory(
    has_room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_room:
        monkeypatch.setattr(weights, "memory_bytes", lambda: 0)
    tensors = {name: torch.randn(300, size) for name, size in (("a", 1000), ("b", 7))}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    reader = weights.Weights(stored)
    assert all(torch.equal(reader.read(stored[name]), expected) for name, expected in tensors.items())


@pytest.mark.parametrize("size", [0, 1000, 1 << 25])
def test_tensors_in_huge_pages_take_and_keep_numbers(size: int) -> None:
    numbers = torch.empty(size, dtype=torch.uint8)
    prefer_huge_pages(numbers)
    numbers.copy_(torch.arange(size) % 251)
    assert torch.equal(numbers, (torch.arange(size) % 251).to(torch.uint8))
    if size == 1 << 25 and KNOWN:
        assert wishes_for_huge_pages(numbers.data_ptr() + (size >> 1))


@needs_huge_pages
def test_matrices_wish_for_huge_pages_whatever_their_type_becomes() -> None:
    experts = Experts(64, 256, 256)
    for own in (experts, experts.bfloat16()):
        for stack in (own.gate_up, own.down):
            assert wishes_for_huge_pages(stack.data_ptr() + (stack.nbytes >> 1))
    layer = Linear(2048, 4096, bias=False).bfloat16()
    assert wishes_for_huge_pages(layer.weight.data_ptr() + (layer.weight.nbytes >> 1))
    with torch.device("meta"):
        made = Experts(64, 256, 256)
    # Parameters that come from another device are other objects.
    made = made.to_empty(device="cpu")
    assert wishes_for_huge_pages(made.down.data_ptr() + (made.down.nbytes >> 1))
    numbers = experts.gate_up.detach()
    numbers.copy_(torch.randn(numbers.shape))
    assert torch.equal(experts.float().gate_up, numbers.float())


@needs_huge_pages
def test_what_an_optimizer_keeps_wishes_for_huge_pages() -> None:
    layer = Linear(2048, 2048, bias=False)
    weights = MasterWeights(layer, torch.bfloat16, {})
    optimizer = AdamW([{"params": list(weights.masters.values())}], (0.9, 0.95), 1e-8)
    layer(torch.ones(1, 2048, dtype=torch.bfloat16)).sum().backward()
    weights.collect()
    optimizer.step()
    (master,) = weights.masters.values()
    assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), layer.weight)
    for kept in (master, optimizer.state[master]["exp_avg"], optimizer.state[master]["exp_avg_sq"]):
        assert wishes_for_huge_pages(kept.data_ptr() + (kept.nbytes >> 1))


def test_tensors_without_memory_are_left_alone() -> None:
    with FakeTensorMode():
        like = torch.empty(1 << 24)
        assert in_huge_pages(like, torch.bfloat16).dtype == torch.bfloat16
    assert in_huge_pages(torch.empty(1 << 24, device="meta")).is_meta


@needs_huge_pages
def test_numbers_stay_when_their_memory_is_moved() -> None:
    numbers = torch.randn(1 << 23)
    expected = numbers.tolist()[:: 1 << 12]
    move_to_huge_pages(numbers)
    assert wishes_for_huge_pages(numbers.data_ptr() + (numbers.nbytes >> 1))
    assert numbers.tolist()[:: 1 << 12] == expected


def wishes_for_huge_pages(address: int) -> bool:
    """Whether that is noted for the memory there; whether it is so depends on what else the machine has to hold."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(each, 16) for each in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest.split()
    return False


def test_this_machine_has_memory() -> None:
    assert 2**28 < memory_bytes() < 2**45
    assert 0 < spare_bytes() <= memory_bytes()


def test_spare_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\nfile 700000\nkernel 10000\nshmem 30000\nanon_thp 0\n")
    assert memory_bytes() == 1_000_000
    assert spare_bytes() == 760_000
    (tmp_path / "memory.max").write_text("max\n")
    assert spare_bytes() > 1_000_000
