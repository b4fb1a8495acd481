"""`moekit VERB ...`: find the verb, import it alone, and turn errors into words."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module

from moekit.config.errors import InputError

VERBS = {
    "train": ("train", "train a model from a preset or a TOML file, on text"),
    "sweep": ("sweep", "train several variants over several seeds on the same data, and compare them"),
    "plan": ("plan", "what a model stores and computes, whether it fits a machine, how fast it can be there"),
    "generate": ("generate", "continue a prompt"),
    "eval": ("eval", "loss, perplexity and bits per byte of text files"),
    "convert": ("convert", "write a model folder in another type, in other shards, or as GGUF for llama.cpp"),
    "quantize": ("quantize", "write a model folder in groups of 8- or 4-bit numbers, and say what that costs"),
    "inspect": ("inspect", "what a model folder holds: architecture, parameters, types; and whether it is whole"),
    "diff": ("diff", "compare two model folders: configuration, tensors, and logits on a text"),
    "bench": ("bench", "speed of training, prefill and decoding beside other programs and the machine's limits"),
    "report": ("report", "one HTML page on a run: curves, balance, what its experts do"),
}
"""Verb: the module in this package, and one line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed while running, 2 bad input."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output went away; nothing is wrong. Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", "", 130)
    except InputError as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), error.hint, 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_reason(error), "--debug shows where", 1)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from moekit import __version__  # noqa: PLC0415

        print(f"moekit {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise InputError(f"there is no command {verb}", near(verb, VERBS) or f"commands: {', '.join(VERBS)}")
    module = import_module(f"moekit.cli.{VERBS[verb][0]}")
    parser = Parser(prog=f"moekit {verb}", description=VERBS[verb][1], allow_abbrev=False)
    rest = arguments[1:]
    module.configure(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    if not hasattr(module, "SETTINGS"):
        return module.run(parser.parse_args(rest))
    settings, rest = split_settings(rest)
    if help_wanted := {"-h", "--help"} & set(rest):
        named = [argument for argument in rest if argument not in help_wanted]
        parser.epilog = module.help_settings(parser.parse_args(named))
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return module.run(parser.parse_args(rest), settings)


class Parser(argparse.ArgumentParser):
    """argparse, with errors in the words of the house."""

    def parse_args(self, args: list[str]) -> argparse.Namespace:  # type: ignore[override]
        """As argparse does, with the nearest option as a hint where one is unknown."""
        known, unknown = self.parse_known_args(args)
        if unknown:
            hint = near(unknown[0].partition("=")[0], self._option_string_actions)
            raise InputError(f"{unknown[0]} is not understood", hint or f"{self.prog} --help lists the options")
        return known

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing the usage."""
        raise InputError(message.removeprefix("argument "), f"{self.prog} --help lists the options")


def near(word: str, known: Iterable[str]) -> str:
    """A hint to the known word that resembles `word`; empty where none does."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{found[0]}`?" if found else ""


def split_settings(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Apart: settings of the configuration, whose names have a dot (`--optim.lr 0.1`), and all other arguments."""
    settings, rest = [], []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(argument)
            continue
        if not equals:
            value = next(waiting, "")
            if not value:
                raise InputError(f"{name} needs a value", f"for example {name} 1")
        settings.append((name.removeprefix("--"), value))
    return settings, rest


def overview() -> str:
    """What `moekit --help` prints."""
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    return f"""moekit: fine-grained Mixture-of-Experts language models, on a plain CPU and beyond

usage: moekit COMMAND ...

commands:
{verbs}

examples:
  moekit plan deepseek-v3 --device rtx-4090          why 671B does not run on one card, and what it would take
  moekit train tiny --out runs/a                     train a small DeepSeek-V3 architecture on four kinds of text
  moekit train tiny --model.moe.top-k 8 --show-config   any field of the configuration can be set
  moekit generate runs/a --prompt "In the beginning"
  moekit eval runs/a --data notes.txt
  moekit report runs/a                               writes runs/a/report.html

`moekit COMMAND --help` tells more; --version prints the version."""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return f"{type(error).__name__}: {error}" if not str(error) else str(error).splitlines()[0]


def _fail(message: str, hint: str, status: int) -> int:
    for kind, text in (("error", message), ("hint", hint)):
        if text:
            print(f"{kind}: {' '.join(text.splitlines())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
