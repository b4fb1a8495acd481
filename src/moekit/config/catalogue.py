"""Every rule a layer can have, told by its dataclass: the page docs/rules.md and the help of the command line."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from moekit.config.balance import BalanceRule
from moekit.config.capacity import Capacity
from moekit.config.describe import field_helps
from moekit.config.routing import Routing


class Chapter(NamedTuple):
    """One union of rules: its title, the key that sets its rule, the folder of the maths, its rules."""

    title: str
    key: str
    place: str
    rules: tuple[type, ...]


CHAPTERS = (
    Chapter("Selection", "model.moe.routing.kind", "moe/selection/{kind}.py", get_args(Routing)),
    Chapter("Capacity", "model.moe.capacity.kind", "moe/capacity/{kind}.py", get_args(Capacity)),
    Chapter("Balance", "model.moe.balance", "moe/balance/{kind}.py", get_args(BalanceRule)),
)


def kind_of(rule: type) -> str:
    """The tag of a rule's dataclass."""
    return {field.name: field for field in dataclasses.fields(rule)}["kind"].default  # type: ignore[return-value]


def summary(rule: type) -> str:
    """The first line that its author wrote about it."""
    return (rule.__doc__ or "").splitlines()[0]


def settings(rule: type) -> Iterator[tuple[str, Any, str]]:
    """Name, default and help of each setting."""
    helps = field_helps(rule)
    for field in dataclasses.fields(rule):
        if field.name != "kind":
            yield field.name, field.default, helps.get(field.name, "")


def help_lines() -> list[str]:
    """One line for each rule, under the key that sets it."""
    lines = []
    for chapter in CHAPTERS:
        lines += ["", f"rules of {chapter.key.replace('_', '-')}:"]
        lines += [f"  {kind_of(rule):<20} {summary(rule)}" for rule in chapter.rules]
    return lines


def page() -> str:
    """The page of all rules, in Markdown."""
    lines = [
        "# Selection, capacity and balance",
        "",
        "Written from the configuration by `make docs`; each rule is one short file under `src/moekit/`.",
        "How rules compare on the same text: `moekit sweep labs/balance.toml --out runs/balance`.",
        "",
        "    moekit train tiny --model.moe.routing.kind switch --model.moe.top-k 1 --model.moe.capacity.factor 1.25",
        "",
        "```python",
        "from moekit.config.capacity import ExpertCapacity",
        "from moekit.config.routing import SwitchRouting",
        "",
        "config = moekit.MoEConfig(width=64, top_k=1, routing=SwitchRouting(), capacity=ExpertCapacity(factor=1.25))",
        "y, routing = moekit.MoE(config)(x)   # routing.experts as chosen, routing.served as served",
        "```",
    ]
    for chapter in CHAPTERS:
        lines += ["", f"## {chapter.title} (`{chapter.key}`)"]
        for rule in chapter.rules:
            kind = kind_of(rule)
            where = f"`{rule.__module__}.{rule.__name__}`; maths: `{chapter.place.format(kind=kind)}`."
            lines += ["", f"### {kind}", "", f"{summary(rule)} {where}"]
            rows = list(settings(rule))
            if rows:
                lines += ["", "| setting | default | |", "|---|---|---|"]
                lines += [f"| `{name}` | `{_shown(default)}` | {text} |" for name, default, text in rows]
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
