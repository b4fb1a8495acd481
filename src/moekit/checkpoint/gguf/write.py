"""Write a GGUF file, one tensor at a time."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from moekit.checkpoint.gguf.architecture import architecture
from moekit.checkpoint.gguf.fields import model_fields
from moekit.checkpoint.gguf.parts import Part, parts
from moekit.checkpoint.gguf.vocabulary import vocabulary
from moekit.checkpoint.storage import flush
from moekit.config.errors import InputError
from moekit.config.model import MLAConfig, ModelConfig
from moekit.model.mla import LATENT_EPSILON
from moekit.tensors import Tensor

DType = Literal["float32", "float16", "bfloat16"]

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_TYPE = {"float32": 0, "float16": 1, "bfloat16": 32}
"""general.file_type"""

GGML_TYPE = {"float32": 0, "float16": 1, "bfloat16": 30}
"""The type of a tensor in the file."""

Laid = list[tuple[Part, tuple[Tensor, ...]]]


def write_gguf(
    config: ModelConfig,
    tensor: Callable[[str], Tensor],
    path: Path,
    dtype: DType,
    tokenizer: Tokenizer | None,
    ends: tuple[int, ...] = (),
) -> list[str]:
    """Write the model as the GGUF file `path`, which must not exist; it appears whole or not at all.

    `tensor` gives one of the model's tensors by its name in the state dict; it is asked for each once and in turn, so
    that memory holds one. Matrices are stored as `dtype`; norms, routers and biases as float32. `ends` are the tokens
    that end a text (empty: the tokenizer's). Multi-token prediction is left out. Returns notes on what llama.cpp will
    do otherwise than moekit. Raises ConfigError for a model that no architecture of llama.cpp computes, InputError for
    an existing file, a missing package, a tokenizer that does not fit, and weights too large for float16.
    """
    gguf = _package()
    if os.path.lexists(path):
        raise InputError(f"{path} exists already", "choose another name")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder", "create it first")
    chosen = architecture(config)
    words = vocabulary(tokenizer, config.vocab_size, ends)
    fields = {"general.type": "model", "general.file_type": FILE_TYPE[dtype], "general.quantization_version": 2}
    fields |= model_fields(config, chosen) | words.fields
    building = path.with_name(f".{path.name}.writing")
    try:
        with closing(gguf.GGUFWriter(building, chosen.name)) as writer:
            _add_fields(writer, fields)
            _add_tensors(writer, list(parts(config, chosen)), tensor, dtype)
        flush(building)
        building.rename(path)
    finally:
        building.unlink(missing_ok=True)
    flush(path.parent)
    return words.notes + _notes(config)


def _notes(config: ModelConfig) -> list[str]:
    notes = ["multi-token prediction is left out of the file"] if config.mtp_depth else []
    if isinstance(config.attention, MLAConfig) and config.norm_epsilon != LATENT_EPSILON:
        notes.append(
            f"llama.cpp's norms of the latents use `norm_epsilon` = {config.norm_epsilon}, moekit's {LATENT_EPSILON}"
        )
    return notes


def _package() -> Any:
    try:
        import gguf  # noqa: PLC0415

        # A folder of this name would pass for the package.
        _ = gguf.GGUFWriter
    except (ImportError, AttributeError):
        raise InputError("writing GGUF needs the package `gguf`", "pip install 'moekit[gguf]'") from None
    return gguf


def _add_fields(writer: Any, fields: dict[str, Any]) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for key, value in fields.items():
        adders[type(value)](key, value)


def _add_tensors(writer: Any, laid: Laid, tensor: Callable[[str], Tensor], dtype: DType) -> None:
    """The file lists the shapes of all tensors before it holds the first."""
    for part, empty in laid:
        for name, shape in zip(part.names, empty, strict=True):
            stored = _stored(name, shape, dtype)
            size = shape.numel() * TORCH[stored].itemsize
            writer.add_tensor_info(name, tuple(shape.shape), np.dtype(np.float32), size, GGML_TYPE[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, _ in laid:
        for name, values in zip(part.names, part.cut(tensor(part.ours).detach()), strict=True):
            writer.write_tensor_data(_bytes(name, values, _stored(name, values, dtype)))


def _stored(name: str, values: Tensor, dtype: DType) -> DType:
    """llama.cpp wants vectors in float32, and routers are worth it: their logits decide."""
    return "float32" if values.dim() == 1 or "ffn_gate_inp" in name else dtype


def _bytes(name: str, values: Tensor, dtype: DType) -> np.ndarray:
    cast = values.to("cpu", TORCH[dtype]).contiguous()
    if dtype == "float16" and not cast.isfinite().all():
        raise InputError(f"{name}: holds values that float16 cannot", "write bfloat16 or float32")
    return cast.flatten().view(torch.uint8).numpy()
