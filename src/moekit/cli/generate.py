"""`moekit generate`: continue prompts with a model folder."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli.console import say
from moekit.config.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moekit.generation.generate import Speed
    from moekit.generation.sampling import SamplingConfig
    from moekit.generation.text import Completion


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("path", metavar="PATH", help="model folder: a run of moekit, or a Hugging Face MoE folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help='text to continue ("": begin one); repeatable')
    add("--ids", action="append", default=[], metavar="1,2,3", help="token ids to continue; repeatable")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (%(default)s)")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0 takes the best token (%(default)s)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all (%(default)s)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens that reach P (%(default)s)")
    add("--min-p", type=float, default=0.0, metavar="P", help="keep tokens with P times the best's (%(default)s)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this string; repeatable")
    add("--task", type=int, metavar="N", help="task of the texts, where the model routes by task")
    add("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as the folder stores it")
    add("--json", action="store_true", help="print one JSON object: ids (prompt and new), text (new), speed")


def run(args: argparse.Namespace) -> int:
    """Load, continue, print."""
    sampling = _sampling(args)
    rows_of_ids = [parse_ids(text) for text in args.ids]
    if bool(args.prompt) == bool(args.ids):
        raise InputError("give either --prompt or --ids", 'for example --prompt "Once upon a time"')

    from moekit.checkpoint.load import load, load_config, stop_ids  # noqa: PLC0415 - torch only when it is needed
    from moekit.cli.device import prepare_device  # noqa: PLC0415
    from moekit.evaluate.loss import check_tasks  # noqa: PLC0415
    from moekit.generation.generate import check_causal  # noqa: PLC0415
    from moekit.generation.text import Stop, complete, encode_prompt  # noqa: PLC0415

    config = load_config(args.path)
    tokenizer = _tokenizer(args)
    ends = stop_ids(args.path)
    prompts = rows_of_ids or [encode_prompt(tokenizer, text, ends) for text in args.prompt if tokenizer is not None]
    # Before anything is printed: a prompt that is shown and not continued would look like an answer.
    check_causal(config)
    check_tasks(config, args.task, len(prompts))
    _check_lengths(prompts, args.max_new_tokens, config.max_positions)
    prepare_device(args.device)
    model = load(args.path, dtype=None if args.dtype == "auto" else args.dtype, device=args.device)
    live = len(prompts) == 1 and tokenizer is not None and not args.json
    beginnings = args.prompt or ["" if tokenizer is None else tokenizer.decode(ids) for ids in prompts]
    if live:
        _show(beginnings[0])
    done = complete(
        model,
        tokenizer,
        prompts,
        args.max_new_tokens,
        sampling,
        args.seed,
        Stop(ids=ends, strings=tuple(args.stop)),
        on_text=(lambda _, text: _show(text)) if live else None,
        task=args.task,
    )
    if args.json:
        print(json.dumps(as_json(done.rows, done.speed)))
        return 0
    print("" if live else "\n\n".join(_as_text(*pair) for pair in zip(beginnings, done.rows, strict=True)))
    say(_as_words(done.speed))
    return 0


def parse_ids(text: str) -> list[int]:
    """Token ids from `1,2,3`."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--ids {text}: not a list of whole numbers", "write --ids 1,2,3") from None
    if min(ids) < 0:
        raise InputError(f"--ids {text}: {min(ids)} is negative", "ids are counted from 0")
    return ids


def as_json(rows: "tuple[Completion, ...]", speed: "Speed") -> dict[str, object]:
    """What scripts read; these names stay."""
    return {"ids": [row.ids for row in rows], "text": [row.text for row in rows], **speed._asdict()}


def _sampling(args: argparse.Namespace) -> "SamplingConfig":
    from moekit.generation.sampling import SamplingConfig  # noqa: PLC0415

    if args.max_new_tokens < 0:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: must not be negative")
    return SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


def _tokenizer(args: argparse.Namespace) -> "Tokenizer | None":
    """The folder's tokenizer; ids can do without."""
    from moekit.checkpoint.load import load_tokenizer  # noqa: PLC0415
    from moekit.data.tokenizer import FILE  # noqa: PLC0415

    if args.ids and not args.stop and not (Path(args.path) / FILE).exists():
        return None
    return load_tokenizer(args.path)


def _check_lengths(prompts: list[list[int]], max_new_tokens: int, limit: int) -> None:
    longest = max(len(prompt) for prompt in prompts)
    if longest > limit:
        raise InputError(f"the prompt has {longest} tokens, but the model is made for {limit}", "shorten the prompt")
    if longest + max_new_tokens > limit:
        say(f"note: text beyond {limit} tokens is longer than the model is made for")


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _as_text(beginning: str, row: "Completion") -> str:
    return ",".join(map(str, row.ids)) if row.text is None else beginning + row.text


def _as_words(speed: "Speed") -> str:
    rates = zip(("prefill", "decode"), speed, strict=True)
    return ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates if rate is not None)
