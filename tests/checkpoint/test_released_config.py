"""The `config.json` released with DeepSeek-V3."""

import json
from pathlib import Path
from typing import Any

from moekit.checkpoint.load import load_config
from moekit.config.families import family_for, meaning
from moekit.config.presets.load import load_run

RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def written(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(RELEASED | changes), "utf-8")
    return folder


def test_it_describes_the_model_of_our_preset(tmp_path: Path) -> None:
    found, preset = load_config(written(tmp_path)), load_run("deepseek-v3").model
    differing = {"init_std"}
    for name in set(found.__dataclass_fields__) - differing:
        assert getattr(found, name) == getattr(preset, name), name
    assert family_for(preset).model_type == "deepseek_v3"


def test_newer_rope_parameters_say_the_same(tmp_path: Path) -> None:
    old = load_config(written(tmp_path))
    scaling = {name: value for name, value in RELEASED["rope_scaling"].items() if name != "type"}
    parameters = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    new = load_config(written(tmp_path, rope_scaling=None, rope_theta=None, rope_parameters=parameters))
    assert meaning(new) == meaning(old)
