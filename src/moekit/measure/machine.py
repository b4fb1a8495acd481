"""The limits of this machine: memory, read bandwidth, rate of dense products, time to launch a layer."""

import datetime
import platform
from dataclasses import replace

import torch
import torch.nn.functional as F

from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.kernels import few_rows
from moekit.kernels.experts import LANES
from moekit.kernels.linear import reads_once
from moekit.measure.clock import least_seconds
from moekit.measure.models import fill
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from moekit.plan.blueprint import Blueprint, Mixture
from moekit.plan.devices import Device
from moekit.tensors import Tensor
from moekit.tensors.memory import memory_bytes, prefer_huge_pages

NAME = "this-machine"

READ_BYTES = 1 << 29
"""Read to measure the bandwidth: more than any cache holds."""

SIDE = 2048
"""Rows and columns of the products that are timed, and columns of the matrices that a vector reads."""

ROWS = (1408, 4096, 32768)
"""Rows of those matrices: some libraries read large ones faster."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def this_machine(dtype: str) -> Device:
    """Measure for some seconds. The figures are the best of several tries, so that they bound what a model can do.

    The bandwidth is that at which a product of a vector and a matrix of `dtype` ("float32", "bfloat16") reads the
    matrix, which is what decoding does; where the library's products are slower than memory, it is below that of plain
    reading, which `source` tells as well.
    """
    rates = {name: _product_rate(each) for name, each in DTYPES.items()}
    reading, plain = vector_bandwidth(DTYPES[dtype]), _read_bandwidth()
    source = (
        f"measured on {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"bandwidth as products of {dtype} read, plain reading {plain / 1e9:.1f} GB/s"
    )
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Device(NAME, "cpu", memory_bytes(), reading, rates, {}, 1, 0.0, source, now)


def rate_for(blueprint: Blueprint, dtype: str, tokens: int, logits: int) -> float:
    """FLOP/s of all products of `blueprint` over `tokens` at once, each shape timed with the rows that it gets.

    The experts of a layer are timed together, as they are computed; each gets its even share of the tokens, and with
    few rows its products are slower than large ones. The head gets the `logits` tokens whose next one is wanted.
    """
    flops, seconds, known = 0.0, 0.0, dict[tuple[int, ...], float]()
    for weight in blueprint.weights:
        if weight.kind != "product" or not weight.active or weight.part == "routed":
            continue
        rows = logits if weight.part == "head" else tokens
        outer, inner = weight.shape
        if (rows, outer, inner) not in known:
            known[rows, outer, inner] = _product_seconds(rows, inner, outer, DTYPES[dtype])
        flops += 2.0 * weight.used * rows * weight.numel
        seconds += weight.used * known[rows, outer, inner]
    for mixture in blueprint.mixtures:
        flops += 2.0 * mixture.layers * tokens * mixture.top_k * mixture.expert
        seconds += mixture.layers * _experts_seconds(mixture, blueprint.width, tokens, DTYPES[dtype])
    return flops / seconds


def narrow(config: ModelConfig) -> ModelConfig:
    """`config` with as many layers and experts, all of them as narrow as compiled code for experts may be."""
    attention = config.attention
    if isinstance(attention, MLAConfig):
        sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        rank = None if attention.q_lora_rank is None else 8
        attention = replace(attention, n_heads=2, q_lora_rank=rank, **sizes)
    else:
        assert isinstance(attention, GQAConfig)
        n_kv_heads = 2 if attention.n_kv_heads == attention.n_heads else 1
        attention = replace(attention, n_heads=2, n_kv_heads=n_kv_heads, head_dim=8)
    moe = replace(config.moe, width=0, expert_width=LANES, shared_expert_width=0)
    return replace(config, width=2 * LANES, dense_width=LANES, vocab_size=32, attention=attention, moe=moe, mtp_depth=0)


def _read_bandwidth() -> float:
    """Bytes/s of reading memory once."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / least_seconds(numbers.sum, 9, warm=2)


def vector_bandwidth(dtype: torch.dtype, n_bytes: int = READ_BYTES) -> float:
    """Bytes/s at which a product with one vector reads a matrix; matrices of `n_bytes` in all are read in turn."""
    x = torch.ones(1, SIDE, dtype=dtype)
    best = 0.0
    for rows in ROWS:
        size = rows * SIDE * dtype.itemsize
        stack = torch.empty(max(n_bytes // size, 1), rows, SIDE, dtype=dtype)
        prefer_huge_pages(stack)
        stack.fill_(1)
        seconds = least_seconds(lambda stack=stack: [_product(x, matrix) for matrix in stack], 5)
        best = max(best, stack.nbytes / seconds)
    return best


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large dense product, or of large experts where these are faster."""
    product = 2 * SIDE**3 / _product_seconds(SIDE, SIDE, SIDE, dtype)
    tokens, experts = SIDE, Mixture(1, 2, 1, 3 * SIDE * SIDE // 2, 0)
    return max(product, 2 * tokens * experts.expert / _experts_seconds(experts, SIDE, tokens, dtype))


def _product_seconds(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """Least seconds of [rows, inner] times a matrix [outer, inner] as a linear layer has it.

    The matrix stays in a cache where it fits, as it never does in a model: the rate is one to bound by.
    """
    x, matrix = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    return least_seconds(lambda: _product(x, matrix), 5, warm=2)


@torch.no_grad()
def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """As a linear layer of a model computes it."""
    return few_rows.linear(x, matrix, x.dtype) if reads_once(x, matrix, len(x)) else F.linear(x, matrix)


@torch.no_grad()
def _experts_seconds(mixture: Mixture, width: int, tokens: int, dtype: torch.dtype) -> float:
    """Least seconds of one layer's experts, each with its even share of `tokens`."""
    experts = Experts(mixture.n_routed, width, mixture.expert // (3 * width)).to(dtype)
    fill(experts)
    taken = torch.arange(tokens * mixture.top_k).view(tokens, -1) % mixture.n_routed
    weights = torch.full(taken.shape, 1 / mixture.top_k)
    scores = torch.zeros(tokens, mixture.n_routed)
    x, routing = torch.randn(tokens, width).to(dtype), Routing(taken, weights, scores, scores)
    plan = experts.plan(x, routing)
    return least_seconds(lambda: experts(x, weights, plan), 5, warm=2)
