"""Numbers that are not finite are found wherever they stand, by plain reads that skip holes."""

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moekit.checkpoint import values
from moekit.checkpoint.header import ITEM_BYTES, read_header, write_header
from moekit.checkpoint.values import all_zero, data_bytes, not_finite

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write(file: Path, tensors: dict[str, tuple[str, bytes]], gap: bytes = b"") -> None:
    """A file of these tensors. `gap` bytes come first, in a tensor of their own, and move all others along."""
    entries = {"gap": ("U8", gap), **tensors}
    header = write_header((name, dtype, (len(raw) // ITEM_BYTES[dtype],)) for name, (dtype, raw) in entries.items())
    file.write_bytes(header + b"".join(raw for _, raw in entries.values()))


def finite_twin(dtype: str, raw: bytes) -> bool:
    return bool(torch.frombuffer(bytearray(raw), dtype=TORCH[dtype]).double().isfinite().all()) if raw else True


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**9), gap=st.integers(0, 9), chunk=st.sampled_from([8, 16, 64, 1 << 24]))
def test_it_agrees_with_torch_on_random_bits(
    seed: int, gap: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "CHUNK", chunk)
    rng = random.Random(seed)
    tensors = {}
    for number in range(12):
        dtype = rng.choice(list(TORCH))
        # Few numbers, so that many tensors have no odd one.
        tensors[f"t{number}"] = (dtype, rng.randbytes(ITEM_BYTES[dtype] * rng.randint(0, 24)))
    write(tmp_path / "f.safetensors", tensors, rng.randbytes(gap))
    expected = [name for name, (dtype, raw) in tensors.items() if not finite_twin(dtype, raw)]
    assert not_finite(read_header(tmp_path / "f.safetensors")) == expected


@pytest.mark.parametrize("dtype", TORCH)
def test_every_exponent_is_judged_as_torch_does(dtype: str, tmp_path: Path) -> None:
    """The two highest bytes of a number hold its exponent. Each pattern stands in a tensor of its own."""
    size = ITEM_BYTES[dtype]
    patterns = range(0, 1 << 16, 8) if size > 1 else range(256)
    raws = [bytes(max(size - 2, 0)) + pattern.to_bytes(2, "little")[:size] for pattern in patterns]
    tensors = {str(number): (dtype, raw) for number, raw in enumerate(raws)}
    write(tmp_path / "f.safetensors", tensors)
    kinds = torch.frombuffer(bytearray(b"".join(raws)), dtype=TORCH[dtype]).double()
    expected = [str(number) for number in (~kinds.isfinite()).nonzero().flatten().tolist()]
    assert expected
    assert not_finite(read_header(tmp_path / "f.safetensors")) == expected


@pytest.mark.parametrize("place", [0, 1, 7, 8, 9, 4095, 4096, 99_999])
def test_one_number_at_any_place_is_found(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK", 32)
    weight = torch.zeros(100_000)
    weight[place] = torch.inf
    raw = weight.numpy().tobytes()
    write(tmp_path / "f.safetensors", {"a": ("F32", raw[:400]), "b": ("F32", raw)}, b"xyz")
    assert not_finite(read_header(tmp_path / "f.safetensors")) == ["a", "b"][0 if place < 100 else 1 :]


def sparse(file: Path, marks: dict[int, bytes], count: int = 1 << 20) -> None:
    """A file of float32 zeros, not aligned to them, of which only a few bytes are stored."""
    header = write_header([("shift", "U8", (3,)), ("w", "F32", (count,)), ("v", "F32", (count,))])
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 3 + 8 * count)
        for place, content in marks.items():
            opened.seek(len(header) + 3 + place)
            opened.write(content)


def holds_holes(folder: Path) -> bool:
    sparse(folder / "probe", {})
    return data_bytes([folder / "probe"]) < 1 << 20


NAN = b"\0\0\xc0\x7f"


@pytest.mark.parametrize("marks", [{}, {4 * 500_000: NAN}, {4 * 1_048_575: NAN}, {4 << 20: NAN}, {4 * 2_000_000: NAN}])
def test_holes_are_skipped_and_what_stands_between_them_is_found(marks: dict[int, bytes], tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    sparse(file, marks)
    if not holds_holes(tmp_path):
        pytest.skip("this file system keeps no holes")
    assert data_bytes([file]) < 1 << 20 < file.stat().st_size
    assert not_finite(read_header(file)) == ["w" if place < 4 << 20 else "v" for place in marks]


def test_a_number_across_the_border_of_a_hole_is_read_whole(tmp_path: Path) -> None:
    """Blocks of a file begin at multiples of 4096, numbers here do not: the first byte of this one is in a hole."""
    file = tmp_path / "f.safetensors"
    sparse(file, {})
    start = read_header(file)["w"].start
    number = (4096 * 100 - start) // 4
    assert start + 4 * number + 1 == 4096 * 100
    sparse(file, {4 * number + 1: NAN[1:]})
    assert not_finite(read_header(file)) == ["w"]


def test_without_knowledge_of_holes_all_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.safetensors"
    sparse(file, {4 * 500_000: NAN})

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert data_bytes([file]) == file.stat().st_size
    assert not_finite(read_header(file)) == ["w"]


def test_types_without_such_numbers_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "f.safetensors", {"n": ("I32", b"\xff" * 64)})
    assert not_finite(read_header(tmp_path / "f.safetensors")) == []


def test_all_zero_sees_every_byte(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    sparse(file, {4 * 1_048_575 + 3: b"\1"})
    found = read_header(file)
    assert [all_zero(found[name]) for name in ("w", "v")] == [False, True]
