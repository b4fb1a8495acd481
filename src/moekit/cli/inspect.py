"""`moekit inspect`: what a model folder holds, and whether it is whole."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.console import show_table
from moekit.config.codec import to_dict
from moekit.config.errors import InputError
from moekit.config.model import Attention, MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting

if TYPE_CHECKING:
    from moekit.checkpoint.folder import Problem
    from moekit.checkpoint.inspect import Inspection

NOTHING = ("-", "-")

SHOWN = 10
"""Problems of one kind, and shards, that are listed; --json has all."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("path", metavar="PATH", help="model folder: a run of moekit, or a Hugging Face MoE folder")
    add("--values", action="store_true", default=None, help="read all numbers, however many: are they finite?")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look, print, and fail if anything is wrong."""
    from moekit.checkpoint.inspect import inspect  # noqa: PLC0415 - torch comes late

    found = inspect(Path(args.path), args.values)
    if args.json:
        print(json.dumps(as_json(args.path, found)))
    else:
        show(args.path, found)
    if found.problems:
        first, count = found.problems[0], len(found.problems)
        number = "1 problem" if count == 1 else f"{count} problems, the first"
        raise InputError(f"{number}: {first.text}", first.hint)
    return 0


def as_json(path: str, found: "Inspection") -> dict[str, Any]:
    """What scripts read; these names stay."""
    return {
        "path": path,
        "model_type": found.model_type,
        "architecture": architecture(found.config),
        "routing": routing(found.config),
        "parameters": None if found.parts is None else _parameters(found),
        "dtypes": {kind: {"tensors": space.tensors, "bytes": space.bytes} for kind, space in found.dtypes.items()},
        "shards": [shard._asdict() for shard in found.shards],
        "values": found.values.state,
        "token_ids": found.token_ids,
        "copies": found.copies,
        "ignored": found.ignored,
        "problems": [{"kind": problem.kind, "text": problem.text} for problem in found.problems],
    }


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The shape of the model, without its experts."""
    return {
        "layers": config.n_layers,
        "dense_layers": len(config.dense_layers),
        "moe_layers": len(config.moe_layers),
        "width": config.width,
        "dense_width": config.dense_width if config.dense_layers else None,
        "attention": to_dict(config.attention),
        "rope": to_dict(config.rope),
        "vocabulary": config.vocab_size,
        "context": config.max_positions,
        "prediction_modules": config.mtp_depth,
        "tied_embeddings": config.tie_embeddings,
    }


def routing(config: ModelConfig) -> dict[str, Any] | None:
    """How a token comes to its experts; None for a model without any."""
    if not config.moe_layers:
        return None
    moe, rule = config.moe, to_dict(config.moe.routing)
    rule.pop("epsilon", None)
    if rule.get("n_groups") == 1:
        rule["group_score"] = None
    return {
        **rule,
        "n_routed": moe.n_routed,
        "top_k": moe.top_k,
        "selection_bias": any(rule.kind == "bias" for rule in moe.balance),
        "expert_width": moe.expert_width,
        "n_shared": moe.n_shared,
        "shared_width": moe.shared_width,
        "shared_gate": moe.shared_gate,
    }


def _parameters(found: "Inspection") -> dict[str, Any]:
    counts = found.parts or {}
    return {
        "total": sum(count.total for count in counts.values()),
        "active": sum(count.active for count in counts.values()),
        "by_part": {part: count._asdict() | {"bytes": found.part_bytes.get(part)} for part, count in counts.items()},
    }


def show(path: str, found: "Inspection") -> None:
    """The report for a reader."""
    for label, text in facts(path, found):
        print(f"{label + ':':<12}{text}")
    if found.parts is not None:
        _show_parts(_parameters(found))
    rows = [
        (kind, f"{space.tensors:,}", f"{space.numbers:,}", _size(space.bytes)) for kind, space in found.dtypes.items()
    ]
    show_table("stored types", ("type", "tensors", "numbers", "bytes"), rows)
    shards = [(shard.file, f"{shard.tensors:,}", _size(shard.bytes)) for shard in found.shards]
    more = [(f"... and {len(shards) - SHOWN} more", "", "")] if len(shards) > SHOWN else []
    show_table("files", ("file", "tensors", "bytes"), shards[:SHOWN] + more)
    for line in problem_lines(found.problems):
        print(line)


def facts(path: str, found: "Inspection") -> Iterable[tuple[str, str]]:
    """Label and text of what a reader wants to know first."""
    config = found.config
    n_dense, n_moe = len(config.dense_layers), len(config.moe_layers)
    yield "model", f"{path}, {found.model_type}"
    yield "layers", f"{config.n_layers} of width {config.width}: {n_dense} dense, {n_moe} with experts"
    yield "attention", attention_words(config.attention)
    scaling = config.rope.scaling
    stretched = "" if scaling is None else f", {scaling.kind} by {scaling.factor:g}"
    yield "context", f"{config.max_positions:,} tokens, rotary base {config.rope.theta:g}{stretched}"
    if n_moe:
        yield "routing", routing_words(config.moe)
    yield "prediction", "a module for the token after the next" if config.mtp_depth else "none beyond the next token"
    ids = "no tokenizer beside it" if found.token_ids is None else f"the tokenizer has {found.token_ids:,} ids"
    yield "vocabulary", f"{config.vocab_size:,} embeddings; {ids}"
    size = _size(found.values.bytes)
    yield (
        "values",
        f"not read ({size}); --values reads them" if found.values.state == "not read" else found.values.state,
    )
    for label, names in (("copies", found.copies), ("ignored", found.ignored)):
        if names:
            yield label, ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def attention_words(attention: Attention) -> str:
    """Attention in one line."""
    if isinstance(attention, MLAConfig):
        query = "full queries" if attention.q_lora_rank is None else f"queries of rank {attention.q_lora_rank}"
        latent = f"a latent of {attention.kv_lora_rank} and a rotary key of {attention.qk_rope_head_dim} a token"
        return f"latent (MLA), {attention.n_heads} heads, {query}, {latent}"
    norm = "" if attention.qk_norm == "none" else f", queries and keys normed ({attention.qk_norm})"
    bias = ", biased" if attention.qkv_bias else ""
    keys = f"{attention.n_kv_heads} of keys and values"
    return f"grouped (GQA), {attention.n_heads} heads of {attention.head_dim}, {keys}{norm}{bias}"


def routing_words(moe: MoEConfig) -> str:
    """The routing contract in one line."""
    rule = moe.routing
    if not isinstance(rule, TopKRouting):
        settings = ", ".join(f"{key} {value}" for key, value in to_dict(rule).items() if key != "kind")
        words = [f"{rule.kind}, {moe.top_k} of {moe.n_routed} experts of width {moe.expert_width}", settings]
        return "; ".join([*filter(None, words), *shared_words(moe)])
    words = [f"the best {moe.top_k} of {moe.n_routed} experts of width {moe.expert_width}"]
    if rule.n_groups > 1:
        summed = rule.summed(moe.top_k)
        worth = {1: "best expert", 2: "two best experts"}.get(summed, f"{summed} best experts")
        words.append(f"from the best {rule.top_k_groups} of {rule.n_groups} groups (a group counts by its {worth})")
    late = rule.order == "top_k_then_score"
    biased = ", with a selection bias" if any(each.kind == "bias" for each in moe.balance) else ""
    words.append(f"{'chosen by logit, then ' if late else 'chosen by '}{rule.score}{biased}")
    scaled = "" if rule.scale == 1 else f", times {rule.scale:g}"
    words.append(f"weights {'that sum to 1' if rule.renormalise else 'as scored'}{scaled}")
    return "; ".join([*words, *shared_words(moe)])


def shared_words(moe: MoEConfig) -> list[str]:
    """The shared experts, where there are any."""
    gated = ", gated" if moe.shared_gate else ""
    return [f"{moe.n_shared} shared (width {moe.shared_width}{gated})"] if moe.n_shared else []


def problem_lines(problems: Iterable["Problem"]) -> Iterable[str]:
    """The problems by kind, a few of each."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem.text)
    for kind, texts in kinds.items():
        yield f"{kind}: {len(texts)}"
        yield from (f"  {text}" for text in texts[:SHOWN])
        if len(texts) > SHOWN:
            yield f"  ... and {len(texts) - SHOWN} more"


def _show_parts(parameters: dict[str, Any]) -> None:
    total, by_part = parameters["total"], parameters["by_part"]
    rows = [
        (part, f"{count['total']:,}", f"{count['total'] / total:.1%}", f"{count['active']:,}", *_stored(count))
        for part, count in by_part.items()
    ]
    tied = () if "head" in by_part else (("head (the embedding)", "0", "0.0%", "0", *NOTHING),)
    known = [count["bytes"] for count in by_part.values()]
    sums = {"total": total, "bytes": sum(known) if all(known) else None}
    whole = ("all", f"{total:,}", "100.0%", f"{parameters['active']:,}", *_stored(sums))
    columns = ("part", "stored", "share", "active for a token", "bytes", "bits each")
    show_table("parameters", columns, [*rows, *tied, whole])


def _stored(count: dict[str, Any]) -> tuple[str, str]:
    """The bytes of a part, and the bits of each of its numbers."""
    size = count["bytes"]
    return NOTHING if size is None else (_size(size), f"{8 * size / count['total']:.2f}")


def _size(n_bytes: int) -> str:
    """Bytes in words; decimal, as disks and the hub count."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
