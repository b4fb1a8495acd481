"""A deep model in 4 bits: reading a prompt, decoding token by token, and starting a process for its first token."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from moekit.checkpoint.save import save
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.measure.bench.limits import dense_product, reading
from moekit.measure.bench.processes import Job, in_processes
from moekit.measure.bench.quantised_layer import GROUPS
from moekit.measure.bench.row import Row, rate_row, time_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.turns import OURS, Entrant, clocked, take_turns
from moekit.measure.models import random_quantised
from moekit.measure.peers import llama_cpp
from moekit.measure.peers.random_gguf import write_random_gguf
from moekit.measure.verify import describe
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts
from moekit.plan.from_config import blueprint_of

BEGINNING = (1, 2, 3, 4, 5, 6, 7, 8)
"""What is read before the first token that is timed."""

VARIANT = "Q4_0"


def prefill(setting: Setting) -> Iterator[Row]:
    """A prompt at once, up to the logits after it."""
    config, length = setting.sizes.deep, setting.sizes.prompt
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    model = random_quantised(config, GROUPS)

    @torch.inference_mode()
    def ours() -> None:
        states = model.hidden(torch.tensor([ids]), model.new_cache(length)).states
        model.head(states[:, -1])

    limit = dense_product("bfloat16", setting.sizes.side, 1 / flops_of_a_token(config))
    with in_processes(_llama(setting, llama_cpp.prompt_reading, ids), float(length)) as theirs:
        timings = take_turns([Entrant(OURS, "", length, clocked(ours)), limit, *theirs], setting.pace)
    label = f"model, prompt of {length} tokens, 4 bits: {describe(config)}"
    yield rate_row("model-prefill-int4", "prefill", label, "tokens/s", timings)


def decode(setting: Setting) -> Iterator[Row]:
    """One token after the other, behind a short text."""
    model = random_quantised(setting.sizes.deep, GROUPS)
    limit = reading(setting.sizes.read_bytes, 1 / bytes_of_a_token(model))
    with in_processes(_llama(setting, llama_cpp.decoding, BEGINNING), 1.0) as theirs:
        timings = take_turns([Entrant(OURS, "", 1, clocked(_decoding(model))), limit, *theirs], setting.pace)
    label = f"model, decoding, 4 bits: {describe(setting.sizes.deep)}"
    ours = next(timing for timing in timings if timing.program == OURS)
    details = {"GB/s": bytes_of_a_token(model) / ours.seconds / 1e9}
    yield rate_row("model-decode-int4", "decode", label, "tokens/s", timings, details)


def start(setting: Setting) -> Iterator[Row]:
    """From the start of `moekit generate` on a folder to the end of the process, with one token."""
    folder = str(_folder(setting))
    ours = ["-m", "moekit", "generate", folder, "--ids", "1,2,3", "--max-new-tokens", "1", "--temperature", "0"]
    commands = {(OURS, ""): ours}
    if llama_cpp.NAME in setting.peers:
        module = ["-m", llama_cpp.__name__, str(_gguf(setting)), str(torch.get_num_threads())]
        commands[llama_cpp.NAME, VARIANT] = module
    entrants = [Entrant(*name, 0, clocked(_process(arguments))) for name, arguments in commands.items()]
    label = f"process from start to first token, 4 bits: {describe(setting.sizes.deep)}"
    yield time_row("generate-start-int4", "decode", label, take_turns(entrants, setting.pace), 1)


def flops_of_a_token(config: ModelConfig) -> int:
    """Of the products with weights; a prompt's tokens but the last do not meet the head, which is left out."""
    products = (weight for weight in blueprint_of(config, "", "").weights if weight.kind == "product")
    return round(sum(2 * weight.used * weight.numel for weight in products if weight.part != "head"))


def bytes_of_a_token(model: Transformer) -> int:
    """Weights that are read to compute one token; the embedding's one row is left out."""
    idle = 0
    for module in model.modules():
        if isinstance(module, Experts):
            stacks = module.gate_up.nbytes + module.down.nbytes
            idle += stacks * (model.config.moe.n_routed - model.config.moe.top_k) // model.config.moe.n_routed
    return sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes - idle


@torch.inference_mode()
def _decoding(model: Transformer) -> Callable[[], object]:
    cache = model.new_cache(llama_cpp.CONTEXT)
    token = torch.tensor([BEGINNING[:1]])
    model.hidden(torch.tensor([BEGINNING]), cache)

    @torch.inference_mode()
    def step() -> None:
        model.head(model.hidden(token, cache).states[:, -1])

    return step


def _process(arguments: list[str]) -> Callable[[], object]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def work() -> None:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, env=environment, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
            raise ChildProcessError(f"python {shlex.join(arguments)} failed: {reason}")

    return work


def _llama(setting: Setting, make: Callable[..., Callable[[], None]], ids: Sequence[int]) -> list[Job]:
    """llama.cpp's part, if it takes one: in a process of its own, which may die without ours."""
    if llama_cpp.NAME not in setting.peers:
        return []
    return [Job(llama_cpp.NAME, VARIANT, make, (_gguf(setting), torch.get_num_threads(), ids))]


def _folder(setting: Setting) -> Path:
    path = setting.folder / "moekit"
    if not path.exists():
        model = random_quantised(setting.sizes.deep, GROUPS)
        _need_room(setting, sum(p.nbytes for p in model.parameters()))
        save(model, path)
    return path


def _gguf(setting: Setting) -> Path:
    path = setting.folder / "random.gguf"
    if not path.exists():
        # Q4_0 takes 18 bytes for 32 weights.
        stored = sum(weight.stored for weight in blueprint_of(setting.sizes.deep, "", "").weights)
        _need_room(setting, stored * 18 // 32)
        write_random_gguf(setting.sizes.deep, path)
    return path


def _need_room(setting: Setting, n_bytes: int) -> None:
    free = shutil.disk_usage(setting.folder).free
    where = f"{n_bytes / 1e9:.1f} GB in {setting.folder.parent}"
    if free < 1.1 * n_bytes:
        raise InputError(f"a model to measure needs {where}, where {free / 1e9:.1f} GB are free", "set TMPDIR")
    setting.say(f"writing {where}, for a while")
