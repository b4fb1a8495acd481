"""The blueprint of a GGUF file, from its metadata and the names of its tensors, checked against their sizes."""

from pathlib import Path
from typing import Any

from moekit.config.balance import BiasBalance
from moekit.config.errors import ConfigError, InputError, check
from moekit.config.families.trunk import check_layers
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.plan.blueprint import Blueprint
from moekit.plan.from_config import blueprint_of
from moekit.plan.gguf import Header, read_gguf

ARCHITECTURES = ("llama", "deepseek", "deepseek2", "olmoe", "qwen2", "qwen2moe", "qwen3", "qwen3moe")

UNTOLD = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold constants, not parameters."""


def blueprint_of_gguf(path: Path) -> Blueprint:
    """The shape of the model in `path`. A note says how many numbers the tensors hold, and what the shape leaves out.

    Raises InputError for a file that is no whole GGUF file, and for an architecture that is not known.
    """
    header = read_gguf(path)
    architecture = header.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: the architecture {architecture!r} is not supported", f"supported: {known}")
    try:
        config = _Model(architecture, header).config()
    except ConfigError as error:
        raise InputError(f"{path}: {error}", error.hint or "convert the model again with a current llama.cpp") from None
    name = header.fields.get("general.name")
    found = blueprint_of(config, name if isinstance(name, str) else path.stem, architecture, header.dominating_type)
    return found._replace(notes=tuple(_notes(header, sum(weight.stored for weight in found.weights))))


def _notes(header: Header, told: int) -> list[str]:
    held, size = header.parameters, header.bytes
    taken = "" if size is None else f" in {size:,} bytes, {8 * size / held:.2f} bits each"
    notes = [f"the file's tensors hold {held:,} numbers{taken}"]
    if held != told:
        more = "more" if held > told else "fewer"
        notes.append(f"that is {abs(held - told):,} {more} than the shape its metadata tells: {_reason(header)}")
    return notes


def _reason(header: Header) -> str:
    """Tensors that no shape tells of: constants, and what stands there twice."""
    extra = {name: header.tensors[name].numel for name in UNTOLD if name in header.tensors}
    whole = [name for name in header.tensors if name.endswith("attn_kv_b.weight")]
    twice = sum(header.tensors[name].numel for name in whole if name.replace("kv_b", "k_b") in header.tensors)
    if twice:
        extra["attn_kv_b.weight, which attn_k_b and attn_v_b repeat"] = twice
    if not extra:
        return "the file holds tensors that its architecture does not have, or lacks some"
    return "; ".join(f"{count:,} in {name}" for name, count in extra.items())


class _Model:
    """A model's configuration, as far as it decides on sizes, out of llama.cpp's keys and names."""

    def __init__(self, architecture: str, header: Header) -> None:
        self.architecture, self.fields, self.tensors = architecture, header.fields, header.tensors

    def get(self, key: str, default: int | None = None) -> int:
        """The whole number `<architecture>.<key>`; where there is one for each layer, they must be equal."""
        name = f"{self.architecture}.{key}"
        given: Any = self.fields.get(name, default)
        value: Any = given[0] if isinstance(given, tuple) and len(set(given)) == 1 else given
        check(value is not None, name, "is missing from the metadata")
        check(type(value) is int and 0 <= value < 2**63, name, f"{value!r} is no whole number for all layers")
        return value

    def in_layers(self, name: str) -> list[int]:
        """The layers that have the tensor `name`."""
        return [layer for layer in range(self.n_layers) if f"blk.{layer}.{name}" in self.tensors]

    def shape(self, name: str, layers: list[int]) -> tuple[int, ...] | None:
        """The shape of the tensor `name` in the first of the layers that has it."""
        found = (self.tensors.get(f"blk.{layer}.{name}") for layer in layers)
        return next((tensor.shape for tensor in found if tensor is not None), None)

    def config(self) -> ModelConfig:
        self.n_layers = self.get("block_count")
        check_layers(self.n_layers, f"{self.architecture}.block_count")
        embedding = self.tensors.get("token_embd.weight")
        check(embedding is not None, "token_embd.weight", "is missing from the file")
        mixed = self.in_layers("ffn_gate_inp.weight")
        return ModelConfig(
            vocab_size=embedding.shape[0] if embedding else 0,
            width=self.get("embedding_length"),
            n_layers=self.n_layers,
            dense_layers=tuple(sorted(set(range(self.n_layers)) - set(mixed))),
            dense_width=self.get("feed_forward_length"),
            attention=self.latent() if f"{self.architecture}.attention.kv_lora_rank" in self.fields else self.heads(),
            moe=self.mixture(mixed) if mixed else MoEConfig(),
            tie_embeddings="output.weight" not in self.tensors,
            max_positions=self.get("context_length"),
        )

    def heads(self) -> GQAConfig:
        n_heads = self.get("attention.head_count")
        check(n_heads > 0, f"{self.architecture}.attention.head_count", f"{n_heads} must be above 0")
        head_dim = self.get("attention.key_length", self.get("embedding_length") // n_heads)
        layers = list(range(self.n_layers))
        norm = self.shape("attn_q_norm.weight", layers)
        return GQAConfig(
            n_heads=n_heads,
            n_kv_heads=self.get("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            qkv_bias=bool(self.in_layers("attn_q.bias")),
            out_bias=bool(self.in_layers("attn_output.bias")),
            qk_norm="none" if norm is None else "head" if norm == (head_dim,) else "full",
        )

    def latent(self) -> MLAConfig:
        """Newer files tell the widths of absorbed heads, and those of whole ones under keys of their own."""
        rotary = self.get("rope.dimension_count")
        whole = self.get("attention.key_length_mla", self.get("attention.key_length", 0))
        return MLAConfig(
            n_heads=self.get("attention.head_count"),
            q_lora_rank=self.get("attention.q_lora_rank", 0) or None,
            kv_lora_rank=self.get("attention.kv_lora_rank"),
            qk_nope_head_dim=whole - rotary,
            qk_rope_head_dim=rotary,
            v_head_dim=self.get("attention.value_length_mla", self.get("attention.value_length", 0)),
        )

    def mixture(self, mixed: list[int]) -> MoEConfig:
        shared = self.shape("ffn_up_shexp.weight", mixed)
        n_groups = self.get("expert_group_count", 1) or 1
        limit = self.get("expert_group_used_count", n_groups) or n_groups
        return MoEConfig(
            expert_width=self.get("expert_feed_forward_length", self.get("feed_forward_length")),
            n_routed=self.get("expert_count"),
            n_shared=int(shared is not None),
            shared_expert_width=shared[0] if shared else 0,
            top_k=self.get("expert_used_count"),
            shared_gate=bool(self.in_layers("ffn_gate_inp_shexp.weight")),
            routing=TopKRouting(n_groups=n_groups, top_k_groups=limit),
            balance=(BiasBalance(),) if self.in_layers("exp_probs_b.bias") else (),
        )
