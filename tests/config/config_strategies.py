"""Random valid configurations, as recipes.

Hypothesis draws a recipe and the test makes the configuration: the type checks of the suite use `random`, which a
strategy must not.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from hypothesis import strategies as st

from moekit.config import balance
from moekit.config.model import (
    GQAConfig,
    LinearConfig,
    Llama3Config,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    YarnConfig,
)
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.config.run import DataConfig, OptimConfig, RunConfig, Source, TrainSection

counts = st.integers(1, 300)
amounts = st.floats(min_value=1e-30, max_value=1e30)
shares = st.floats(min_value=0.0, max_value=1.0)
names = st.text(min_size=1, max_size=12)


@dataclass(frozen=True)
class Recipe:
    """A class and its arguments, which may be recipes or tuples of them."""

    cls: type
    arguments: dict[str, Any]

    def make(self) -> Any:
        return self.cls(**{name: made(argument) for name, argument in self.arguments.items()})


def made(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(made(entry) for entry in argument)
    return argument.make() if isinstance(argument, Recipe) else argument


def recipes(cls: type, **arguments: Any) -> st.SearchStrategy[Recipe]:
    """Recipes of `cls` with these arguments, each a strategy, and any value for the fields that choose among words."""
    for field in fields(cls):
        if get_origin(field.type) is Literal:
            arguments.setdefault(field.name, st.sampled_from(get_args(field.type)))
        elif field.type is bool:
            arguments.setdefault(field.name, st.booleans())
    return st.fixed_dictionaries(arguments).map(lambda drawn: Recipe(cls, drawn))


mla = recipes(
    MLAConfig,
    n_heads=counts,
    q_lora_rank=st.none() | counts,
    kv_lora_rank=counts,
    qk_rope_head_dim=counts.map(lambda n: 2 * n),
    v_head_dim=counts,
)
gqa = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda drawn: recipes(
        GQAConfig,
        n_heads=st.just(drawn[0] * drawn[1]),
        n_kv_heads=st.just(drawn[0]),
        head_dim=counts.map(lambda n: 2 * n),
        clip_qkv=st.none() | amounts,
    )
)
yarn = recipes(YarnConfig, factor=amounts, mscale=shares, mscale_all_dim=shares, attention_factor=st.none() | amounts)
linear = recipes(LinearConfig, factor=amounts)
llama3 = recipes(
    Llama3Config, factor=amounts, low_freq_factor=st.floats(0.1, 1.0), high_freq_factor=st.floats(2.0, 9.0)
)
rope = recipes(RopeConfig, theta=st.floats(1.5, 1e30), scaling=st.none() | yarn | linear | llama3)


def rules(n_routed: int) -> st.SearchStrategy[tuple[Recipe, ...]]:
    """Some of the balancing rules, each at most once."""
    n_devices = st.sampled_from([n for n in range(1, n_routed + 1) if n_routed % n == 0])
    scope = st.sampled_from(get_args(balance.Scope))
    every_rule = (
        recipes(balance.BiasBalance, rate=shares, until_step=st.integers(0, 300)),
        recipes(balance.ExpertLoss, coefficient=amounts, scope=scope),
        recipes(balance.DeviceLoss, n_devices=n_devices, scope=scope),
        n_devices.flatmap(
            lambda n: recipes(balance.CommunicationLoss, n_devices=st.just(n), max_devices=st.integers(1, n))
        ),
        recipes(balance.SequenceLoss, coefficient=amounts),
        *(
            recipes(cls, coefficient=amounts)
            for cls in (
                balance.RouterZLoss,
                balance.FirstChoiceLoss,
                balance.ImportanceLoss,
                balance.VarianceLoss,
                balance.EntropyLoss,
            )
        ),
    )
    kept = st.lists(st.booleans(), min_size=len(every_rule), max_size=len(every_rule))
    return st.tuples(st.tuples(*every_rule), kept).map(
        lambda drawn: tuple(rule for rule, keep in zip(*drawn, strict=True) if keep)
    )


@st.composite
def moe_layers(draw: st.DrawFn) -> Recipe:
    n_groups = draw(st.integers(1, 4))
    size = draw(st.integers(2, 8))
    top_k_groups = draw(st.integers(1, n_groups))
    n_shared = draw(st.integers(0, 3))
    routing = recipes(
        TopKRouting,
        epsilon=shares,
        scale=amounts,
        n_groups=st.just(n_groups),
        top_k_groups=st.just(top_k_groups),
    )
    layer = recipes(
        MoEConfig,
        expert_width=counts,
        n_routed=st.just(n_groups * size),
        n_shared=st.just(n_shared),
        shared_expert_width=st.just(0) | counts,
        top_k=st.integers(2, top_k_groups * size),
        shared_gate=st.booleans() if n_shared else st.just(False),
        shared_average=st.booleans() if n_shared else st.just(False),
        expert_dropout=shares.map(lambda share: 0.9 * share),
        routing=routing,
        balance=rules(n_groups * size),
    )
    return draw(layer)


def models_of(n_layers: int) -> st.SearchStrategy[Recipe]:
    return recipes(
        ModelConfig,
        vocab_size=counts,
        n_layers=st.just(n_layers),
        dense_layers=st.sets(st.integers(0, n_layers - 1)).map(lambda layers: tuple(sorted(layers))),
        attention=mla | gqa,
        rope=rope,
        moe=moe_layers(),
        mtp_depth=st.integers(0, 1),
    )


sources = st.lists(recipes(Source, path=names, domain=names, weight=amounts), max_size=3).map(tuple)
runs = recipes(
    RunConfig,
    model=st.integers(1, 6).flatmap(models_of),
    data=recipes(DataConfig, sources=sources, tokenizer=names),
    optim=recipes(OptimConfig, lr=amounts, beta1=shares),
    train=recipes(TrainSection, steps=counts),
    seed=st.integers(),
    device=names,
)
