"""Hold what a folder stores against what its configuration wants: which tensor is which part of which of ours."""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from moekit.checkpoint.description import Description, present
from moekit.checkpoint.folder import Contents, Problem, contents
from moekit.checkpoint.groups import STORED, grouped_shape, quantisable
from moekit.checkpoint.header import Stored
from moekit.checkpoint.pieces import Piece, piece_shape, pieces
from moekit.checkpoint.weights import TORCH
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.config.quantisation import SCALE, Fp8Blocks, Groups, Quantisation
from moekit.model.transformer import Transformer

DERIVED = (".rotary_emb.inv_freq",)
"""Endings of tensors that older files hold and that follow from the configuration."""

MOST_MISSING = 100_000
"""Missing tensors that are looked for: a damaged number of experts must not keep us busy for hours."""


class Source(NamedTuple):
    """A stored tensor, the part of ours that it is and the shape of that, and the scales where it is in FP8 blocks."""

    piece: Piece
    stored: Stored
    scale: Stored | None
    shape: tuple[int, ...]

    @property
    def grouped(self) -> bool:
        """Whether it holds groups of whole numbers."""
        return self.stored.dtype == STORED


class Fit(NamedTuple):
    """The model without its weights, the sources of each of its tensors by our name, and what does not fit.

    There is no model where files are missing or damaged.
    """

    model: Transformer | None
    sources: dict[str, list[Source]]
    contents: Contents
    problems: tuple[Problem, ...]


def fit(folder: Path, found: Description) -> Fit:
    """Compare by headers alone. Raises InputError where `config.json` describes no model at all, or none is there."""
    held = contents(folder)
    if held.problems:
        return Fit(None, {}, held, held.problems)
    config = present(found, set(held.tensors))
    model = empty_model(config, folder, len(held.tensors))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        shapes.pop("head.weight", None)
    wanted = list(islice(pieces(shapes, found.family.names(config)), len(held.tensors) + MOST_MISSING))
    problems = _names(wanted, found, config, held.tensors, folder)
    sources: dict[str, list[Source]] = {}
    for piece in wanted:
        stored = held.tensors.get(piece.hub)
        if stored is not None:
            shape, scale = piece_shape(shapes[piece.ours], piece), held.tensors.get(piece.hub + SCALE)
            problems += _mismatch(piece, shape, found.quantisation, held.tensors)
            sources.setdefault(piece.ours, []).append(Source(piece, stored, scale, shape))
    problems += _misplaced_groups(sources, quantisable(model))
    copies = {"lm_head.weight": "embedding.weight"} if config.tie_embeddings else {}
    for name, ours in (copies | dict(found.family.copies(config))).items():
        if name in held.tensors:
            problems += _mismatch(Piece(name, ours, ()), shapes[ours], found.quantisation, held.tensors)
    return Fit(model, sources, held, tuple(problems))


def fitting(folder: Path, found: Description) -> tuple[Transformer, Fit]:
    """The model without its weights. Raises InputError about the first thing that does not fit."""
    fitted = fit(folder, found)
    if fitted.problems or fitted.model is None:
        first, others = fitted.problems[0], len(fitted.problems) - 1
        more = f" (and {others} more problem{'s' * (others > 1)})" if others else ""
        raise InputError(f"{first.text}{more}", first.hint or f"`moekit inspect {folder}` lists what is wrong")
    return fitted.model, fitted


def empty_model(config: ModelConfig, folder: Path, n_stored: int) -> Transformer:
    """The model without memory for its weights. Raises InputError where there can be no such model."""
    # Each layer has tensors; a damaged number must not keep us busy for hours.
    if config.n_layers > n_stored:
        raise InputError(f"{folder}: config.json wants {config.n_layers} layers, but {n_stored} tensors are stored")
    try:
        with torch.device("meta"), Uninitialised():
            return Transformer(config).eval()
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder / 'config.json'}: describes a model that cannot be: {reason}") from None


class Uninitialised(TorchFunctionMode):
    """Leaves out torch's own initial values: without memory they are nothing, and torch takes a second to find out."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in (init.normal_, init.kaiming_uniform_) else func(*args, **(kwargs or {}))


def _names(
    wanted: list[Piece], found: Description, config: ModelConfig, stored: dict[str, Stored], folder: Path
) -> list[Problem]:
    """What is missing and what nobody asked for."""
    known = {piece.hub for piece in wanted}
    if isinstance(found.quantisation, Fp8Blocks):
        known |= {name + SCALE for name in known if name in stored and stored[name].dtype == "F8_E4M3"}
    known |= found.family.copies(config).keys() | found.family.zeros(config).keys()
    known |= {"lm_head.weight"} if config.tie_embeddings else set()
    all_known = len(wanted) < len(stored) + MOST_MISSING
    unexpected = [name for name in stored if all_known and name not in known and not name.endswith(DERIVED)]
    problems = [
        Problem("missing", f"{folder}: {piece.hub} is missing, which config.json wants")
        for piece in wanted
        if piece.hub not in stored
    ]
    return problems + [
        Problem("unexpected", f"{stored[name].file}: holds {name}, for which config.json has no use")
        for name in unexpected
    ]


def _mismatch(
    piece: Piece, expected: tuple[int, ...], quantisation: Quantisation | None, tensors: dict[str, Stored]
) -> list[Problem]:
    """A wrong shape or type of a tensor, or of the scales of its blocks."""
    stored, name = tensors[piece.hub], piece.hub
    if stored.dtype == STORED:
        return _rows(piece, expected, quantisation, stored)
    if stored.shape != expected:
        text = f"{stored.file}: {name} is {list(stored.shape)}, config.json wants {list(expected)}"
        return [Problem("wrong shape", text)]
    if stored.dtype not in TORCH:
        known = ", ".join(TORCH)
        return [Problem("wrong type", f"{stored.file}: {name} is of type {stored.dtype}, not one of {known}")]
    return _scales(piece, expected, quantisation, tensors) if stored.dtype == "F8_E4M3" else []


def _rows(piece: Piece, expected: tuple[int, ...], quantisation: Quantisation | None, stored: Stored) -> list[Problem]:
    """What is wrong with the rows of bytes of a quantised tensor."""
    name = f"{stored.file}: {piece.hub}"
    if not isinstance(quantisation, Groups):
        return [Problem("wrong type", f"{name} is of type U8, but config.json has no quantization_config for it")]
    wanted = grouped_shape(expected, quantisation) if len(expected) > 1 else None
    if wanted is None:
        return [Problem("wrong type", f"{name} is of type U8, but {list(expected)} cannot be {quantisation.name}")]
    if stored.shape != wanted:
        text = f"{name} is U8 {list(stored.shape)}, but {list(expected)} in {quantisation.name} is {list(wanted)}"
        return [Problem("wrong shape", text)]
    return []


def _misplaced_groups(sources: dict[str, list[Source]], allowed: dict[str, str]) -> list[Problem]:
    """Quantised tensors that nothing here can compute with, and modules of which a part alone is quantised."""
    modules: dict[str, list[Source]] = {}
    for ours, own in sources.items():
        modules.setdefault(allowed.get(ours, ""), []).extend(own)
    problems = []
    for path, own in modules.items():
        grouped = [source for source in own if source.grouped]
        if not grouped or (path and len(grouped) == len(own)):
            continue
        first = grouped[0]
        reason = f"but other tensors of {path} are not" if path else "which moekit keeps as it is"
        problems.append(Problem("wrong type", f"{first.stored.file}: {first.piece.hub} is quantised, {reason}"))
    return problems


def _scales(
    piece: Piece, expected: tuple[int, ...], quantisation: Quantisation | None, tensors: dict[str, Stored]
) -> list[Problem]:
    """What is wrong with the scales of a tensor in FP8 blocks."""
    stored, name = tensors[piece.hub], piece.hub
    if not isinstance(quantisation, Fp8Blocks):
        text = f"{stored.file}: {name} is of type F8_E4M3, but config.json has no quantization_config for it"
        return [Problem("wrong type", text)]
    scale = tensors.get(name + SCALE)
    if scale is None or len(expected) != 2:
        return [Problem("missing", f"{stored.file}: {name} is in FP8 blocks, but {name}{SCALE} is missing")]
    blocks = [-(-expected[0] // quantisation.rows), -(-expected[1] // quantisation.columns)]
    if list(scale.shape) != blocks or scale.dtype not in ("F32", "BF16"):
        text = f"{scale.file}: {name}{SCALE} is {scale.dtype} {list(scale.shape)}, but F32 {blocks} is wanted"
        return [Problem("wrong shape", text)]
    return []
