"""Open a model folder: configuration, weights, tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from moekit.checkpoint.description import describe
from moekit.checkpoint.fit import Fit, fitting
from moekit.checkpoint.groups import hold_groups
from moekit.checkpoint.lazy import Reader, read_when_used
from moekit.checkpoint.weights import TORCH, Weights
from moekit.config.errors import InputError
from moekit.config.families import Family
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.config.quantisation import Groups
from moekit.data import tokenizer as tokenizers
from moekit.model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path: str | Path, dtype: torch.dtype | str | None = None, device: str = "cpu") -> Transformer:
    """The model in the folder `path`, ready for evaluation.

    `dtype` converts the weights (None: as they are stored, FP8 blocks as bfloat16); selection biases stay float32.
    What `moekit quantize` has quantised stays so: its layers compute with it, on the CPU and without gradients.

    The folder is held against its configuration at once; a tensor is read when it is first used, an expert when a token
    comes to it. On the CPU, what is stored in `dtype` is mapped, not copied. Leave the files alone while the model is
    in use. Raises InputError for a folder that is missing, damaged, incomplete, or of a kind moekit does not know, and
    when a tensor is read that holds numbers which are not finite.
    """
    folder = Path(path)
    found = describe(folder)
    empty, fitted = fitting(folder, found)
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    model = empty.to(wanted or stored_dtype(fitted))
    model.model_type = found.family.model_type
    if isinstance(found.quantisation, Groups):
        _check_device(folder, device)
        hold_groups(model, {name for name, own in fitted.sources.items() if own[0].grouped}, found.quantisation)
    weights = Weights(fitted.contents.tensors)
    _check_zeros(found.family, model.config, weights)
    read_when_used(model, fitted.sources, Reader(weights, found.quantisation), device)
    return model


def load_config(path: str | Path) -> ModelConfig:
    """The configuration in the folder `path`."""
    return describe(Path(path)).config


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`, or the `tokenizer.json` it names. It must suit the model beside it."""
    folder = Path(path)
    tokenizer = tokenizers.load_tokenizer(folder)
    if (folder / "config.json").is_file():
        check_vocabulary(tokenizer, load_config(folder), folder)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Raise an InputError if the tokenizer has ids for which the model has no embedding."""
    ids = tokenizers.size(tokenizer)
    if ids > config.vocab_size:
        file = folder / tokenizers.FILE
        raise InputError(f"{file}: has {ids} token ids, but the model has {config.vocab_size} embeddings")


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a text, from `generation_config.json` or `config.json`; none where neither says."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        found = read_json(file).get("eos_token_id") if file.is_file() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(number) is int for number in ids):
                raise InputError(f"{file}: `eos_token_id`: {found!r} is no token id")
            return tuple(ids)
    return ()


def stored_dtype(fitted: Fit) -> torch.dtype:
    """The type of the embedding stands for the model's."""
    return TORCH[fitted.sources["embedding.weight"][0].stored.dtype]


def _check_device(folder: Path, device: str) -> None:
    if torch.device(device).type != "cpu":
        hint = "moekit convert FOLDER OUT --dtype bfloat16 restores the weights"
        raise InputError(f"{folder}: is quantised for the CPU, not for {device}", hint)


def _check_zeros(family: Family, config: ModelConfig, weights: Weights) -> None:
    """What stands in the file only because others want it must have no effect."""
    for name in family.blank(config) & weights.tensors.keys():
        stored = weights.tensors[name]
        if stored.numel and (stored.dtype not in TORCH or weights.read(stored).any()):
            raise InputError(f"{stored.file}: {name} is not zero, but config.json has no use for it")
