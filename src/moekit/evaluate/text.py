"""How well a model predicts a text: loss, perplexity and bits per byte, with the uncertainty of the last."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Integer
from tokenizers import Tokenizer

from moekit.config.errors import InputError
from moekit.data.tokenizer import end_of_text
from moekit.evaluate.loss import sequence_nll
from moekit.model.transformer import Transformer

FEWEST_BLOCKS = 5
"""Below this the spread of the blocks says too little about the mean."""


FEW = {1: 12.7062, 2: 4.3027, 3: 3.1824}
"""Quantiles of Student's t for so few degrees of freedom that the expansion is not close."""


class Interval(NamedTuple):
    """Where the value of much more text of the same kind lies, with a probability of 95 %."""

    low: float
    high: float


class Evaluation(NamedTuple):
    """`loss` in nats per token, `perplexity` = exp(loss), `bits_per_byte` of UTF-8, which tokenizers cannot sway.

    `interval` is that of bits_per_byte; None where the text is shorter than five windows.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    interval: Interval | None
    tokens: int
    bytes: int


def evaluate_tokens(  # noqa: PLR0913 - the arguments of `sequence_nll`, and the size of the text
    model: Transformer,
    tokens: Integer[np.ndarray, " N"],
    n_bytes: int,
    start: int,
    sequence_length: int,
    stride: int,
    batch: int = 8,
    on_tokens: Callable[[int], None] | None = None,
    *,
    task: int | None = None,
) -> Evaluation:
    """Evaluate the tokens of a text of `n_bytes` UTF-8 bytes; the other arguments are those of `sequence_nll`."""
    if n_bytes < 1:
        raise InputError("there is no text to evaluate")
    nll = sequence_nll(model, tokens, start, sequence_length, stride, batch, on_tokens, task)
    loss = float(nll.mean())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the model's loss on this text is {loss}")
    per_byte = len(nll) / n_bytes / math.log(2)
    spread = half_width(nll, sequence_length)
    interval = None if spread is None else Interval((loss - spread) * per_byte, (loss + spread) * per_byte)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, loss * per_byte, interval, len(nll), n_bytes)


def half_width(nll: Float64[np.ndarray, " N"], block: int) -> float | None:
    """Half the 95 % interval of the mean of `nll`, from the spread of the means of blocks of `block` tokens.

    Neighbouring tokens are hard or easy together, so that blocks, not tokens, are taken as the independent sample.
    The mean is the ratio of the blocks' summed loss to their number of tokens (the last block may be short); its
    variance is K / (K - 1) * sum (y_k - mean m_k)^2 / N^2 for K blocks of m_k tokens with sums y_k, widened by
    Student's t. Bytes per token are taken as known, and topics longer than a block make the true interval wider.
    """
    begins = np.arange(0, len(nll), block)
    n_blocks = len(begins)
    if n_blocks < FEWEST_BLOCKS:
        return None
    sums = np.add.reduceat(nll, begins)
    sizes = np.diff(begins, append=len(nll))
    residuals = sums - nll.mean() * sizes
    variance = n_blocks / (n_blocks - 1) * float(np.square(residuals).sum()) / len(nll) ** 2
    return student(n_blocks - 1) * math.sqrt(variance)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: by Fisher's expansion around the normal's, within 0.3 % from 4 degrees on."""
    if degrees in FEW:
        return FEW[degrees]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def start_id(tokenizer: Tokenizer, stop_ids: tuple[int, ...] = ()) -> int:
    """The id that stands before a text: what the tokenizer itself puts there, else the end of the text before."""
    own = tokenizer.encode("").ids
    if own:
        return own[0]
    try:
        return end_of_text(tokenizer)
    except InputError:
        if stop_ids:
            return stop_ids[0]
        raise
