"""The demo as a test: what it promises, measured on what it wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moekit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for arguments in (["train", "tiny", "--out", "runs/demo"], ["report", "runs/demo"]):
        command = [sys.executable, "-m", "moekit.cli.main", *arguments]
        result = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return folder / "runs/demo"


def test_the_model_predicts_held_out_text_better_than_gzip_packs_it(demo: Path) -> None:
    average = json.loads((demo / "report.json").read_text("utf-8"))["compression"]["average"]
    assert average["bits_per_byte"] < average["gzip"]


def test_no_expert_is_dead_and_domains_use_different_experts(demo: Path) -> None:
    layers = json.loads((demo / "report.json").read_text("utf-8"))["experts"]["layers"]
    assert all(layer["dead_experts"] == 0 for layer in layers)
    assert all(layer["divergence"] > 10 * layer["shuffled_p95"] for layer in layers)


def test_transformers_opens_the_folder_and_gives_the_same_logits(demo: Path) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(demo, output_loading_info=True, dtype=torch.float32)
    ours = moekit.load(demo)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"]
    prediction = f"model.layers.{ours.config.n_layers}."
    assert all(name.startswith(prediction) for name in info["unexpected_keys"])
    ids = AutoTokenizer.from_pretrained(demo)("In the beginning God created", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
