"""All programs do the same work, and the work is what the formulas say."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import gguf
from moekit.measure.bench.generation import bytes_of_a_token, flops_of_a_token
from moekit.measure.bench.layer import Program, programs, tokens_of, training_step
from moekit.measure.bench.quantised_layer import GROUPS
from moekit.measure.bench.setting import QUICK, Setting
from moekit.measure.bench.shapes import DIRECTIONS, LayerShape, full_sizes, model_config, quick_sizes
from moekit.measure.models import random_quantised
from moekit.measure.peers import transformers
from moekit.measure.peers.random_gguf import write_random_gguf
from moekit.measure.shrink import parameters
from moekit.model.transformer import Transformer
from oracle.compare import relative_error

SIZES = quick_sizes()
SHAPES = [SIZES.trained, SIZES.large, SIZES.large._replace(tokens=1), *SIZES.granular]
SETTING = Setting(SIZES, QUICK, frozenset({transformers.NAME}), Path(), lambda _: None)


def all_programs(shape: LayerShape, copies: int = 1) -> dict[str, Program]:
    return {f"{each.program} {each.variant}": each for each in programs(SETTING.peers, shape, "float32", copies)}


def gradient(program: Program, shape: LayerShape) -> torch.Tensor:
    x = tokens_of(shape, torch.float32)[0].requires_grad_()
    program.apply(program.layers[0], x).pow(2).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("shape", SHAPES)
def test_every_program_gives_the_same_output_and_gradient(shape: LayerShape) -> None:
    found = all_programs(shape, copies=2)
    ours = found.pop("moekit ")
    assert len(found) == len(transformers.back_ends(shape.tokens))
    for tokens in tokens_of(shape, torch.float32):
        expected = ours.apply(ours.layers[1], tokens)
        assert expected.std() > 0
        for name, theirs in found.items():
            assert relative_error(theirs.apply(theirs.layers[1], tokens), expected) <= 1e-5, name
    for name, theirs in found.items():
        if "batched" not in name:
            assert relative_error(gradient(theirs, shape), gradient(ours, shape)) <= 1e-4, name


def counted(program: Program, shape: LayerShape) -> tuple[int, int]:
    """Multiplications and additions of the products that torch sees: of a forward pass, and of a training step."""
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        program.apply(program.layers[0], tokens_of(shape, torch.float32)[0])
    with FlopCounterMode(display=False) as both:
        training_step(program, shape, "float32")()
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_a_layer_are_those_that_transformers_spends(shape: LayerShape) -> None:
    router = 2 * shape.tokens * shape.width * shape.n_routed
    assert counted(all_programs(shape)["transformers eager"], shape) == (
        shape.flops + router,
        DIRECTIONS * (shape.flops + router),
    )


def test_the_trained_models_have_the_same_parameters() -> None:
    for sizes in (SIZES, full_sizes()):
        with torch.device("meta"):
            theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes.model))
        biases = sum(b.numel() for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
        count = sum(p.numel() for p in theirs.parameters()) + biases
        assert parameters(model_config(sizes.model)) == count
    assert count == pytest.approx(146e6, rel=0.01)


def test_both_train_one_step() -> None:
    step = transformers.training_step(SIZES.model, "grouped_mm", "bfloat16", SIZES.batch, SIZES.length)
    step()


def test_llama_cpp_gets_the_same_tensors(tmp_path: Path) -> None:
    write_random_gguf(SIZES.deep, tmp_path / "random.gguf")
    tensors = gguf.GGUFReader(tmp_path / "random.gguf").tensors
    assert sum(int(tensor.n_elements) for tensor in tensors) == parameters(SIZES.deep)
    matrices = [t for t in tensors if len(t.shape) > 1 and "ffn_gate_inp" not in t.name]
    assert {t.tensor_type.name for t in matrices} == {"Q4_0"}
    bits = {8 * int(t.n_bytes) / int(t.n_elements) for t in matrices}
    ours = random_quantised(SIZES.deep, GROUPS).head.weight
    assert bits == {8 * ours.nbytes / (SIZES.deep.vocab_size * SIZES.deep.width)} == {4.5}


def met_weights() -> tuple[int, int]:
    """Weights of the quick model that one token meets: in matrices that are quantised, and in all others."""
    deep, moe, width = SIZES.deep, SIZES.deep.moe, SIZES.deep.width
    attention, mixtures = 4 * 64 * width, deep.n_layers - 1
    experts = 3 * width * moe.expert_width * (moe.top_k + moe.n_shared)
    quantised = deep.n_layers * attention + 3 * width * deep.dense_width + mixtures * experts
    return quantised, mixtures * moe.n_routed * width


def test_flops_of_a_token_are_two_for_each_weight_that_it_meets() -> None:
    assert flops_of_a_token(SIZES.deep) == 2 * sum(met_weights())


def test_bytes_of_a_token_are_those_of_the_weights_that_it_meets() -> None:
    quantised, router = met_weights()
    norms = (2 * SIZES.deep.n_layers + 1) * SIZES.deep.width
    head = SIZES.deep.width * SIZES.deep.vocab_size
    expected = (quantised + head) * 9 // 16 + 2 * (router + norms)
    assert bytes_of_a_token(random_quantised(SIZES.deep, GROUPS)) == expected


def test_a_quantised_random_model_computes_numbers() -> None:
    model: Transformer = random_quantised(SIZES.deep, GROUPS)
    with torch.no_grad():
        logits = model(torch.arange(6).view(1, 6)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
