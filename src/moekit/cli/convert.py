"""`moekit convert`: a model folder in another type, in other shards, or as a GGUF file for llama.cpp."""

import argparse
import json
import re
import time
from pathlib import Path

from moekit.cli.console import Written, say
from moekit.config.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "fp8")

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("source", metavar="SRC", help="model folder: a run of moekit, or a Hugging Face folder")
    add("target", metavar="DST", help="folder (or, with --to gguf, file) to write; must not exist")
    add("--dtype", choices=DTYPES, help="type of the weights (as stored); fp8: DeepSeek-V3's blocks of 128 x 128")
    add("--shard-size", default="5GB", metavar="SIZE", help="largest file, such as 500MB (%(default)s)")
    add("--to", choices=("folder", "gguf"), default="folder", help="what to write (%(default)s)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    source, target = Path(args.source), Path(args.target)
    shard_bytes = parse_size(args.shard_size)
    if args.to == "gguf" and args.dtype == "fp8":
        raise InputError("--dtype fp8: llama.cpp has no such type", "choose float32, bfloat16 or float16")

    from moekit.checkpoint.convert import convert, convert_to_gguf  # noqa: PLC0415 - torch comes late

    started = time.monotonic()
    with Written() as written:
        if args.to == "gguf":
            notes = convert_to_gguf(source, target, args.dtype)
        else:
            notes = convert(source, target, args.dtype, shard_bytes, written.update)
    for note in notes:
        say(f"note: {note}")
    files = [target] if target.is_file() else sorted(target.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if args.json:
        print(json.dumps({"path": str(target), "files": [file.name for file in files], "bytes": size}))
    else:
        took = time.monotonic() - started
        print(f"{target}: {size / 1e9:.3g} GB in {len(files)} file{'s' * (len(files) > 1)}, {took:.1f} s")
    return 0


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB or 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B|)", text.upper())
    if found is None or found[2] not in UNITS or float(found[1]) * UNITS[found[2]] < 1:
        raise InputError(f"--shard-size {text}: is no size", "for example 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])
