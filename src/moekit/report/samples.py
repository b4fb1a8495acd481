"""Text the model wrote, each after its prompt."""

from collections.abc import Sequence

from moekit.report.charts.svg import escape
from moekit.report.values import Sample


def samples(texts: Sequence[Sample]) -> str:
    """One block for each sample, the prompt set apart from what follows it."""
    key = '<p>The prompt is set in <span class="prompt">grey italics</span>; the model wrote the rest.</p>'
    return key + "".join(f"<article><h3>{escape(text.domain)}</h3>{_block(text)}</article>" for text in texts)


def _block(text: Sample) -> str:
    # Isolated by <bdi>, so that a mark that turns the direction of writing ends with its text. The element also keeps
    # a first line break, which <pre> would swallow.
    prompt, rest = escape(text.prompt), escape(text.continuation)
    return f'<pre dir="auto"><bdi class="prompt">{prompt}</bdi><bdi>{rest}</bdi></pre>'
