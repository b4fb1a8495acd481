"""Headers are read as the safetensors library reads them, and as strictly."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moekit.checkpoint.header import ALIGNMENT, LONGEST, read_header
from moekit.checkpoint.shards import entry, write_file
from moekit.checkpoint.weights import NAMES, Weights
from moekit.config.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]

tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)

fresh = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(shapes: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in shapes.items()}


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return same and found.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))


@fresh
@given(shapes=tensors)
def test_what_the_library_writes_is_read(shapes: dict[str, tuple[torch.dtype, list[int]]], tmp_path: Path) -> None:
    expected = made(shapes)
    save_file(expected, tmp_path / "a.safetensors", {"some": "metadata"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.keys() == expected.keys()
    weights = Weights(header)
    for name, stored in header.items():
        assert equal(weights.read(stored), expected[name])


@fresh
@given(shapes=tensors)
def test_the_library_reads_what_is_written(shapes: dict[str, tuple[torch.dtype, list[int]]], tmp_path: Path) -> None:
    expected = made(shapes)
    sizes = list(write_file([entry(name, tensor) for name, tensor in expected.items()], tmp_path / "a.safetensors"))
    assert sizes == [tensor.nbytes for tensor in expected.values()]
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert equal(found[name], tensor)
    header = read_header(tmp_path / "a.safetensors")
    assert all((stored.dtype, stored.start % ALIGNMENT < 64) for stored in header.values())
    if header:
        assert min(stored.start for stored in header.values()) % ALIGNMENT == 0


def library_accepts(file: Path) -> bool:
    try:
        with safe_open(file, framework="np") as opened:
            return all(opened.get_slice(name).get_shape() is not None for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def accepted(file: Path) -> bool:
    try:
        read_header(file)
    except InputError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
        return False
    return True


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    expected = made({"a": (torch.float32, [3, 2]), "b": (torch.bfloat16, [5]), "c": (torch.float16, [])})
    file = tmp_path / "a.safetensors"
    save_file(expected, file)
    content = file.read_bytes()
    refused = 0
    for seed in range(1500):
        rng = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(min(len(damaged), 8 + int.from_bytes(content[:8], "little")))
            match rng.randrange(3):
                case 0:
                    damaged[place] = rng.choice(b'0123456789{}[]",:-.eEFB \x00\xff')
                case 1:
                    del damaged[place : place + rng.randint(1, 12)]
                case _:
                    damaged[place:place] = bytes(rng.choice(b"0123456789,") for _ in range(rng.randint(1, 3)))
        file.write_bytes(damaged)
        if not library_accepts(file):
            refused += 1
            assert not accepted(file), f"seed {seed}: {bytes(damaged)!r}"
    assert refused > 1000


def written(file: Path, header: object, size: int) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    return file


def part(dtype: object = "F32", shape: object = (2,), start: object = 0, stop: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[object, int, str]] = {
    "overlap": ({"a": part(), "b": part(start=4, stop=12)}, 12, "b overlaps what is before it"),
    "same-place": ({"a": part(), "b": part()}, 8, "b overlaps what is before it"),
    "gap": ({"a": part(), "b": part(start=12, stop=20)}, 20, "b lies apart from what is before it"),
    "late-start": ({"a": part(start=4, stop=12)}, 12, "a lies apart from"),
    "beyond-the-file": ({"a": part()}, 4, "its tensors end at byte"),
    "file-goes-on": ({"a": part()}, 9, "its tensors end at byte"),
    "wrong-size": ({"a": part(shape=[3])}, 8, "a is F32 [3], which 8 bytes cannot be"),
    "backwards": ({"a": part(start=8, stop=0)}, 8, "-8 bytes"),
    "negative": ({"a": part(shape=[-2])}, 8, "has the shape [-2]"),
    "huge": ({"a": part(shape=[2**62, 2**62])}, 8, "cannot be"),
    "fraction": ({"a": part(shape=[2.0])}, 8, "has the shape [2.0]"),
    "boolean": ({"a": part(shape=[True, 2])}, 8, "has the shape [True, 2]"),
    "type": ({"a": part(dtype="F13")}, 8, "is of type 'F13', which is not known"),
    "type-of-type": ({"a": part(dtype=["F32"])}, 8, "is of type"),
    "no-shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "lacks a type, a shape or a place"),
    "text-shape": ({"a": part(shape=3)}, 8, "lacks a type, a shape or a place"),
    "three-offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "lacks"),
    "list": ([1, 2], 0, "holds no JSON object"),
    "entry-is-text": ({"a": "b"}, 0, "lacks"),
    "twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', 8, "names a twice"),
    "no-json": (b"{not json", 0, "cannot be read"),
    "no-text": (b"\xff\xfe\xfd\xfc", 0, "cannot be read"),
    "deep": (b"[" * 200_000, 0, "cannot be read"),
}


@pytest.mark.parametrize(("header", "size", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_cannot_be_says_why(header: object, size: int, message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", header, size)
    with pytest.raises(InputError, match="damaged or no safetensors file") as caught:
        read_header(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [9, LONGEST + 1, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_not_believed(length: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(InputError, match="its header should end at byte"):
        read_header(file)


def test_every_stored_type_of_weights_has_its_name() -> None:
    assert set(NAMES) == set(DTYPES)
