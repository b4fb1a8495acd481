"""llama.cpp as the oracle."""

from pathlib import Path

import llama_cpp
import numpy as np


def opened(path: Path) -> llama_cpp.Llama:
    """llama.cpp with a cache in float32, so that only its arithmetic differs from ours."""
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        model_path=str(path),
        n_ctx=64,
        n_batch=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=float32,
        type_v=float32,
    )


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """Of every position, [S V]."""
    oracle = opened(path)
    oracle.eval(ids)
    scores = oracle.scores[: len(ids)].copy()
    oracle.close()
    return scores


def continued(path: Path, ids: list[int], n_new: int) -> list[int]:
    """The most likely tokens after `ids`, one by one through the cache."""
    oracle = opened(path)
    new, step = [], ids
    for _ in range(n_new):
        oracle.eval(step)
        step = [int(oracle.scores[oracle.n_tokens - 1].argmax())]
        new += step
    oracle.close()
    return new


def vocabulary(path: Path) -> llama_cpp.Llama:
    """The tokenizer alone."""
    return llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
