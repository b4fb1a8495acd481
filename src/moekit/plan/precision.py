"""How many bytes numbers take: formats with the scales of their blocks, and the format of each part of a model."""

import difflib
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import PARTS, Part, Weight


class Format(NamedTuple):
    """Numbers of `bits` each, with `scale_bits` more for each block of `block` = (rows, columns); (0, 0): none.

    Rows are a matrix's outputs, columns its inputs. `compute` is the type that products with them are done in: a weight
    that only its storage rounds is widened first.
    """

    name: str
    bits: int
    block: tuple[int, int] = (0, 0)
    scale_bits: int = 0
    compute: Literal["float32", "bfloat16", "float16", "fp8"] = "bfloat16"

    @property
    def quantised(self) -> bool:
        """Whether matrices are rounded further than a computing type."""
        return self.bits < 16

    def blocks_of(self, shape: tuple[int, ...]) -> int:
        """Blocks with a scale in one tensor [..., rows, columns]; the last of a row or column may be incomplete."""
        rows, columns = self.block
        if not columns:
            return 0
        *outer, height, width = (1, *shape) if len(shape) < 2 else shape
        return math.prod(outer) * -(-height // rows) * -(-width // columns)

    def bytes_of(self, shape: tuple[int, ...], count: int = 1) -> int:
        """Bytes of `count` tensors of `shape`, each rounded up to whole bytes, scales included."""
        bits = math.prod(shape) * self.bits + self.blocks_of(shape) * self.scale_bits
        return count * -(-bits // 8)


def _grouped(name: str, bits: int, group: int) -> Format:
    """Groups along the inputs, each with a scale and a zero point in float16."""
    return Format(name, bits, (1, group), 32)


FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("float32", 32, compute="float32"),
        Format("bfloat16", 16),
        Format("float16", 16, compute="float16"),
        # A float32 scale for each 128 x 128 block (arXiv 2412.19437, section 3.3).
        Format("fp8", 8, (128, 128), 32, "fp8"),
        _grouped("int8", 8, 64),
        _grouped("int4", 4, 64),
        # OCP Microscaling Formats 1.0: E2M1 with an E8M0 scale for 32.
        Format("mxfp4", 4, (1, 32), 8),
        # llama.cpp: what a block of 32 or 256 takes beyond its numbers (GGML_QUANT_SIZES).
        Format("q8_0", 8, (1, 32), 16),
        Format("q4_0", 4, (1, 32), 16),
        Format("q4_1", 4, (1, 32), 32),
        Format("q5_0", 5, (1, 32), 16),
        Format("q5_1", 5, (1, 32), 32),
        Format("q2_k", 2, (1, 256), 160),
        Format("q3_k", 3, (1, 256), 112),
        Format("q4_k", 4, (1, 256), 128),
        Format("q5_k", 5, (1, 256), 128),
        Format("q6_k", 6, (1, 256), 144),
    )
}
"""The formats by name. `int4` and `int8` also take a group: int4/128, or int4/none for numbers without scales."""

OTHER_NAMES: Mapping[str, str] = {
    "f32": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "float8": "fp8",
}


class Precision(NamedTuple):
    """A format for each part: `default`, and those of the parts in `named`.

    A quantised default leaves vectors, embedding, head and routers in bfloat16, as released checkpoints do; a part that
    is named is quantised with all its matrices. Selection biases are float32 always.
    """

    name: str
    default: Format
    named: Mapping[Part, Format]

    def format_of(self, weight: Weight) -> Format:
        """The format in which `weight` is stored."""
        if "selection bias" in weight.name:
            return FORMATS["float32"]
        chosen = self.named.get(weight.part, self.default)
        matrix = weight.kind != "vector" and (weight.blocks or weight.part in self.named)
        return chosen if matrix or not chosen.quantised else FORMATS["bfloat16"]

    def bytes_of(self, weight: Weight) -> int:
        """Bytes of all the tensors that `weight` stands for, scales included."""
        return self.format_of(weight).bytes_of(weight.shape, weight.count)


def parse_format(text: str, key: str = "dtype") -> Format:
    """The format called `text`: "bfloat16", "int4", "int4/128", "int4/none". Errors name `key`."""
    name, slash, group = text.strip().lower().partition("/")
    name = OTHER_NAMES.get(name, name)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, [*FORMATS, *OTHER_NAMES], n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(FORMATS)}"
        raise ConfigError(key, f"no format is called {text.strip()!r}", hint)
    if not slash:
        return FORMATS[name]
    if name not in ("int4", "int8"):
        raise ConfigError(
            key, f"{text.strip()!r}: the blocks of {name} are fixed", "int4 and int8 take a group: int4/128"
        )
    bits = FORMATS[name].bits
    if group == "none":
        return Format(f"{name}/none", bits)
    if not (group.isascii() and group.isdigit() and int(group) > 0):
        raise ConfigError(key, f"{text.strip()!r}: {group!r} is no group size", f"write {name}/64, or {name}/none")
    return _grouped(f"{name}/{int(group)}", bits, int(group))


def parse_precision(text: str, key: str = "dtype") -> Precision:
    """ "int4", or a default with parts: "bfloat16,routed=int4,shared=fp8". Without a default it is bfloat16."""
    default, named = None, dict[Part, Format]()
    for entry in text.split(","):
        part, equals, form = entry.partition("=")
        if not equals:
            if default is not None:
                raise ConfigError(key, f"{text!r} names two formats for all parts", "write PART=FORMAT for one part")
            default = parse_format(entry, key)
            continue
        part = part.strip().lower()
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"parts: {', '.join(PARTS)}"
            raise ConfigError(key, f"no part is called {part!r}", hint)
        if part in named:
            raise ConfigError(key, f"{text!r} names a format for {part} twice")
        named[cast(Part, part)] = parse_format(form, key)
    default = default or FORMATS["bfloat16"]
    name = ",".join((default.name, *(f"{part}={form.name}" for part, form in named.items())))
    return Precision(name, default, named)
