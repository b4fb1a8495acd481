"""Generation with a cache gives what reading everything again would give."""

import pytest
import torch

import moekit
from moekit.config.errors import InputError
from moekit.generation.generate import extend, generate
from moekit.generation.sampling import SamplingConfig
from moekit.model.transformer import Transformer

GREEDY = SamplingConfig(temperature=0.0)


def obvious(model: Transformer, ids: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy, everything read again for each token."""
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def test_greedy_with_a_cache_is_the_argmax_of_reading_everything_again(model: Transformer, ids: torch.Tensor) -> None:
    out = generate(model, ids, max_new_tokens=12, temperature=0.0)
    assert torch.equal(out, obvious(model, ids, 12))


def test_the_package_itself_is_the_function(model: Transformer, ids: torch.Tensor) -> None:
    out = moekit.generate(model, ids, max_new_tokens=3, temperature=0.0)
    assert torch.equal(out, generate(model, ids, max_new_tokens=3, temperature=0.0))


def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(model: Transformer, ids: torch.Tensor) -> None:
    lengths = (7, 4, 1)
    mask = torch.stack([torch.arange(7) >= 7 - n for n in lengths])
    out = generate(model, ids * mask, max_new_tokens=10, temperature=0.0, mask=mask)
    for row, n in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 7 - n :], max_new_tokens=10, temperature=0.0)
        assert torch.equal(out[row, 7:], alone[0, n:])


def test_padding_does_not_change_what_the_penalty_sees(model: Transformer, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 10, "temperature": 0.0, "repetition_penalty": 1.3}
    mask = torch.arange(7).expand(1, 7) >= 3
    out = generate(model, ids[:1] * mask, mask=mask, **options)
    assert torch.equal(out[:, 7:], generate(model, ids[:1, 3:], **options)[:, 4:])


def test_the_seed_decides_the_sample(model: Transformer, ids: torch.Tensor) -> None:
    first, again, other = (generate(model, ids, max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_generator_alone(model: Transformer, ids: torch.Tensor) -> None:
    before = torch.get_rng_state()
    generate(model, ids, max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n", [0, 1, 5])
def test_there_are_as_many_new_tokens_as_asked_for(model: Transformer, ids: torch.Tensor, n: int) -> None:
    out = generate(model, ids, max_new_tokens=n)
    assert out.shape == (3, 7 + n)
    assert torch.equal(out[:, :7], ids)


def test_a_row_is_filled_with_its_stop_id(model: Transformer, ids: torch.Tensor) -> None:
    free = generate(model, ids, max_new_tokens=8, temperature=0.0)
    stop = int(free[0, 9])
    out = generate(model, ids, max_new_tokens=8, temperature=0.0, stop_ids=(stop,))
    for row, unstopped in zip(out[:, 7:].tolist(), free[:, 7:].tolist(), strict=True):
        met = unstopped.index(stop) if stop in unstopped else 8
        assert row == (unstopped[: met + 1] + [stop] * 8)[: len(row)]


def test_generation_ends_when_all_rows_have_stopped(model: Transformer, ids: torch.Tensor) -> None:
    free = generate(model, ids, max_new_tokens=20, temperature=0.0)[:, 7:]
    stops = tuple({int(row[3]) for row in free})
    first = max(min(row.index(stop) for stop in stops if stop in row) for row in free.tolist())
    out = generate(model, ids, max_new_tokens=20, temperature=0.0, stop_ids=stops)
    assert out.shape == (3, 7 + first + 1)


def test_the_listener_hears_each_token_and_may_end(model: Transformer, ids: torch.Tensor) -> None:
    heard: list[torch.Tensor] = []

    def listen(token: torch.Tensor) -> bool:
        heard.append(token.clone())
        return len(heard) == 4

    out = generate(model, ids, max_new_tokens=9, on_token=listen)
    assert torch.equal(torch.stack(heard, dim=1), out[:, 7:])


def test_the_model_and_the_result_are_left_ordinary(ids: torch.Tensor, model: Transformer) -> None:
    model.train()
    model.layers[0].eval()
    out = generate(model, ids, max_new_tokens=2)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes[""] and not modes["layers.0"] and not modes["layers.0.attention"] and modes["layers.1.attention"]
    assert torch.is_grad_enabled() and not out.is_inference()
    model(out).logits.sum().backward()
    assert model.head.weight.grad is not None
    model.zero_grad(set_to_none=True)


def test_speed_is_measured_where_there_is_something_to_measure(model: Transformer, ids: torch.Tensor) -> None:
    nothing, one, many = (extend(model, ids, n, GREEDY).speed for n in (0, 1, 4))
    assert nothing == (None, None)
    assert one.prefill_tokens_per_s is not None and one.decode_tokens_per_s is None
    assert many.decode_tokens_per_s is not None and many.decode_tokens_per_s > 0


@pytest.mark.parametrize("wrong", [300, -1])
def test_an_id_outside_the_vocabulary_is_an_error(model: Transformer, wrong: int) -> None:
    with pytest.raises(InputError, match=f"token id {wrong} is outside"):
        generate(model, torch.tensor([[1, wrong]]))


def test_an_empty_prompt_is_an_error(model: Transformer) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        generate(model, torch.zeros(1, 0, dtype=torch.long))


def test_fewer_than_no_tokens_is_an_error(model: Transformer, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        generate(model, ids, max_new_tokens=-1)


@pytest.mark.parametrize("mask", [[True, True, False], [True, False, True], [False, False, False]])
def test_padding_elsewhere_than_on_the_left_is_an_error(model: Transformer, mask: list[bool]) -> None:
    with pytest.raises(InputError, match="padding must stand on the left"):
        generate(model, torch.tensor([[1, 2, 3]]), mask=torch.tensor([mask]))
