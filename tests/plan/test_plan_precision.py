import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_shapes import published, windowed

import gguf
from moekit.config.errors import ConfigError
from moekit.plan.blueprint import PARTS, Weight
from moekit.plan.precision import FORMATS, parse_format, parse_precision
from moekit.tensors.fp8 import quantise_blocks

LLAMA_CPP = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4")


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_blocks_of_llama_cpp_take_what_its_reader_says(name: str) -> None:
    size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert FORMATS[name].bytes_of((3, 4 * size), 5) == 5 * 3 * 4 * type_size


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_computing_type_takes_what_torch_takes(name: str) -> None:
    assert FORMATS[name].bytes_of((3, 5, 7), 2) == 2 * torch.zeros(3, 5, 7, dtype=getattr(torch, name)).nbytes


@given(st.integers(1, 300), st.integers(1, 300))
def test_fp8_takes_what_our_quantised_tensors_take(rows: int, columns: int) -> None:
    blocks = quantise_blocks(torch.ones(rows, columns))
    assert FORMATS["fp8"].bytes_of((rows, columns)) == sum(x.nbytes for x in blocks)


@given(st.integers(1, 40), st.integers(1, 400), st.sampled_from([16, 32, 64, 128]))
def test_groups_run_along_the_inputs_and_hold_two_halves(rows: int, columns: int, group: int) -> None:
    scales = np.zeros((rows, -(-columns // group), 2), np.float16)
    assert parse_format(f"int8/{group}").bytes_of((rows, columns)) == rows * columns + scales.nbytes


def test_int4_in_groups_of_64_takes_four_and_a_half_bits() -> None:
    assert FORMATS["int4"].bytes_of((2048, 7168), 3) * 8 == 3 * 2048 * 7168 * 4.5


def test_a_format_without_scales_takes_its_bits_alone() -> None:
    assert parse_format("int4/none").bytes_of((2048, 7168)) == 2048 * 7168 // 2


def test_fp8_reproduces_the_bytes_of_the_released_deepseek_v3() -> None:
    """Its header: 3,918,786,560 numbers in bfloat16, two of whose matrices [129280 7168] are copies, 680,571,043,840 in
    FP8, and 41,540,496 scales with 15,104 selection biases in float32."""
    shape = published("deepseek-v3")
    precision = parse_precision("fp8")
    own = 3_918_786_560 - 2 * 129_280 * 7168
    wanted = 2 * own + 680_571_043_840 + 4 * (41_540_496 + 59 * 256)
    assert sum(precision.bytes_of(w) for w in shape.weights) == wanted


def test_a_quantised_default_leaves_embedding_router_and_vectors_alone() -> None:
    precision = parse_precision("int4")
    names = {w.name: precision.format_of(w).name for w in windowed().weights}
    assert names == {
        "embedding": "bfloat16",
        "q": "int4",
        "experts, gate and up": "int4",
        "experts, down": "int4",
        "selection bias": "float32",
        "head": "bfloat16",
    }


def test_a_named_part_is_quantised_whole_but_never_its_vectors() -> None:
    precision = parse_precision("bfloat16, head = q6_k, routed=int4/128")
    matrix = Weight("head", "head", (10, 10), 1, 1, blocks=False)
    assert precision.format_of(matrix).name == "q6_k"
    assert precision.format_of(matrix._replace(kind="vector")).name == "bfloat16"
    assert precision.format_of(matrix._replace(part="routed")).name == "int4/128"
    assert precision.format_of(matrix._replace(part="attention")).name == "bfloat16"


def test_plain_types_hold_for_everything() -> None:
    weights = [Weight(part, "any", (4, 4), 1, 1, blocks=False) for part in PARTS]
    assert {parse_precision("float32").format_of(w).name for w in weights} == {"float32"}


def test_the_name_of_a_precision_reads_back_as_the_same() -> None:
    for text in ("int4", "bf16", "float32,routed=int4/32", "routed=fp8,shared=int8/none"):
        precision = parse_precision(text)
        assert parse_precision(precision.name) == precision


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("bf61", "bf61", "bf16"),
        ("", "no format", "known"),
        ("int4/x", "no group size", "int4/64"),
        ("int4/0", "no group size", "int4/64"),
        ("int4/-3", "no group size", "int4/64"),
        ("fp8/64", "fixed", "int4"),
        ("int4,int8", "two formats", "PART=FORMAT"),
        ("rooted=int4", "rooted", "routed"),
        ("routed=int4,routed=int8", "twice", ""),
        ("routed=", "no format", "known"),
    ],
)
def test_a_wrong_precision_names_the_key_and_what_is_wrong(text: str, said: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_precision(text, "dtype")
    assert error.value.key == "dtype"
    assert said in str(error.value)
    assert hint in error.value.hint
