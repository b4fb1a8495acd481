"""Multi-token prediction: transformers' own module reads ours from the folder and predicts the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import YARN, attention, random_model, small
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from moekit.checkpoint.convert import convert
from moekit.checkpoint.load import load
from moekit.checkpoint.save import save_model
from moekit.config.model import ModelConfig, RopeConfig
from moekit.train.objective import Rows, objective

CONFIGS = {
    "plain": small(mtp_depth=1),
    "everything": small(attention=attention(5, True), mtp_depth=1, rope=RopeConfig(theta=5000.0, scaling=YARN)),
    "no-dense-layer": small(mtp_depth=1, dense_layers=()),
}


def ids() -> torch.Tensor:
    return torch.randint(0, 23, (2, 19), generator=torch.Generator().manual_seed(3))


def their_logits(main: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of token i + 2 at place i, by transformers."""
    # transformers knows the module's place in models of 61 layers alone.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{main.config.num_hidden_layers}.*"]
    module = MtpModel.from_pretrained(main).eval()
    hidden = main.model(tokens[:, :-2]).last_hidden_state
    embedded = module.embed_tokens(tokens[:, 1:-1])
    length = embedded.shape[1]
    places = torch.arange(length).unsqueeze(0)
    future = torch.full((length, length), -torch.inf).triu(1)[None, None]
    rotation = module.rotary_emb(embedded, places)
    return module.shared_head(module.layers[0](embedded, hidden, rotation, future, places, None))


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@torch.no_grad()
@pytest.mark.parametrize("shard_bytes", [3000, 10**9])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_it_predicts_what_transformers_predicts(config: ModelConfig, shard_bytes: int, tmp_path: Path) -> None:
    save_model(random_model(config).state_dict(), config, tmp_path / "saved", None)
    convert(tmp_path / "saved", tmp_path / "model", None, shard_bytes)
    main = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ours, tokens = load(tmp_path / "model"), ids()
    states = ours.hidden(tokens[:, :-2]).states
    found = ours.head(ours.hidden_after_next(states, tokens[:, 1:-1]).states)
    torch.testing.assert_close(found, their_logits(main, tokens), rtol=1e-4, atol=1e-4)


def test_a_loaded_module_gives_the_loss_that_training_would(tmp_path: Path) -> None:
    config = CONFIGS["everything"]
    model = random_model(config)
    save_model(model.state_dict(), config, tmp_path / "model", None)
    loaded, tokens = load(tmp_path / "model"), ids()
    found, expected = (objective(each, Rows(tokens), 0.3, 1.0, {}) for each in (loaded, model))
    torch.testing.assert_close(found.terms["mtp"], expected.terms["mtp"], rtol=1e-5, atol=0)
    logits = model.head(model.hidden_after_next(model.hidden(tokens[:, :-2]).states, tokens[:, 1:-1]).states)
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
    torch.testing.assert_close(found.terms["mtp"], by_hand, rtol=1e-4, atol=0)
