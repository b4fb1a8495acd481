"""How a model is made: its weights, its memory, and its second prediction."""

import pytest
import torch
from model_cases import ATTENTIONS, random_ids, small_config, small_model

from moekit.config.model import ModelConfig
from moekit.model.norm import RMSNorm
from moekit.model.transformer import Transformer
from oracle.compare import relative_error


def made_from(seed: int, config: ModelConfig) -> dict[str, torch.Tensor]:
    return Transformer(config, torch.Generator().manual_seed(seed)).state_dict()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_seed_makes_one_model(attention: str) -> None:
    config = small_config(attention, mtp_depth=1)
    one = made_from(3, config)
    torch.manual_seed(99)
    other = made_from(3, config)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_seeds_make_two_models() -> None:
    one, other = (made_from(seed, small_config()) for seed in (3, 4))
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_weights_start_at_their_standard_deviation_norms_at_one_and_biases_at_zero() -> None:
    model = Transformer(small_config("mla-bias", width=256, init_std=0.05), torch.Generator().manual_seed(0))
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            assert parameter.eq(1).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.numel() > 1000:
            assert 0.045 < parameter.std() < 0.055, name


def test_a_tied_head_shares_the_memory_of_the_embedding() -> None:
    tied, untied = (Transformer(small_config(tie_embeddings=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.weight
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 19 * 12


def test_a_tied_head_stays_tied_when_the_model_is_moved() -> None:
    model = Transformer(small_config(tie_embeddings=True)).to(torch.bfloat16)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_model_on_the_meta_device_has_the_same_tensors_and_no_memory(attention: str) -> None:
    config = small_config(attention, mtp_depth=1)
    with torch.device("meta"):
        hollow = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in hollow.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())


@torch.no_grad()
def test_a_model_filled_from_meta_computes_as_the_original() -> None:
    model = small_model(0)
    with torch.device("meta"):
        other = Transformer(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    ids = random_ids(0, 2, 5)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_layers_named_dense_have_no_routing() -> None:
    model = small_model(0, n_layers=4, dense_layers=(0, 2))
    output = model(random_ids(0, 2, 5))
    assert len(output.routings) == len(model.moe_layers()) == 2
    assert all(routing.n_sequences == 2 for routing in output.routings)


def test_a_model_of_dense_layers_has_no_routing_at_all() -> None:
    model = small_model(0, dense_layers=(0, 1), mtp_depth=1)
    assert model(random_ids(0, 2, 5)).routings == ()
    assert model.moe_layers() == []


def test_every_weight_gets_a_gradient() -> None:
    model = small_model(0, mtp_depth=1)
    states, routings = model.hidden(random_ids(0, 4, 30))
    second = model.hidden_after_next(states, random_ids(1, 4, 30))
    (model.head(states).logsumexp(-1).sum() + model.head(second.states).logsumexp(-1).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert len(routings) == 1


def test_the_gradient_of_the_model_equals_a_finite_difference() -> None:
    model = small_model(0, "gqa", dense_layers=(0, 1)).double()
    x = torch.randn(1, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = model._context(random_ids(0, 1, 4), None, None)
    assert torch.autograd.gradcheck(lambda x: model.layers[1](x, context).x, (x,), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_second_prediction_reads_the_embedding_first_and_the_state_behind_it() -> None:
    model = small_model(0, mtp_depth=1)
    states, other_states = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0))
    ids, other_ids = random_ids(0, 1, 5), random_ids(1, 1, 5)
    projection = model.mtp.projection.weight
    eye, zero = torch.eye(12), torch.zeros(12, 12)
    projection.copy_(torch.cat([eye, zero], dim=1))
    one, other = (model.hidden_after_next(s, ids).states for s in (states, other_states))
    assert torch.equal(one, other)
    projection.copy_(torch.cat([zero, eye], dim=1))
    one, other = (model.hidden_after_next(states, i).states for i in (ids, other_ids))
    assert torch.equal(one, other)


@torch.no_grad()
def test_the_second_prediction_is_causal() -> None:
    model = small_model(0, mtp_depth=1)
    states, ids = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0)), random_ids(0, 1, 6)
    changed = ids.clone()
    changed[0, 4:] += 1
    one, other = (model.hidden_after_next(states, i % 19).states for i in (ids, changed))
    assert relative_error(one[:, :4], other[:, :4]) <= 1e-5
    assert not torch.allclose(one[:, 4:], other[:, 4:])


def test_the_second_prediction_shares_embedding_and_head() -> None:
    with_second, without = (Transformer(small_config(mtp_depth=depth)) for depth in (1, 0))
    added = set(with_second.state_dict()) - set(without.state_dict())
    assert all(name.startswith("mtp.") for name in added)
    assert not any("embedding.weight" in name or "head.weight" in name for name in added)


def test_asking_for_a_second_prediction_where_there_is_none_is_refused() -> None:
    model = small_model(0)
    with pytest.raises(ValueError, match="no multi-token prediction"):
        model.hidden_after_next(torch.zeros(1, 3, 12), random_ids(0, 1, 3))


def test_the_head_is_all_that_stands_between_hidden_states_and_logits() -> None:
    model = small_model(0)
    ids = random_ids(0, 2, 5)
    assert torch.equal(model.head(model.hidden(ids).states), model(ids).logits)


def test_an_empty_batch_passes_through() -> None:
    assert small_model(0)(torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 19)
