"""`moekit plan` answers in words, in JSON and on a page, at once and without torch; nonsense is one line."""

import json
import re
from pathlib import Path

import pytest
from cli_cases import Moekit, assert_refused, contents
from test_help import modules_of

from moekit.plan.devices import devices
from moekit.plan.sources import preset_names


def planned(moekit: Moekit, *arguments: str) -> dict:
    said = moekit("plan", *arguments, "--json")
    assert (said.status, said.err) == (0, "")
    return json.loads(said.out)


def test_published_numbers_of_deepseek_v3_are_in_the_json(moekit: Moekit) -> None:
    found = planned(moekit, "deepseek-v3", "--tokens", "14.8T")
    assert (found["source"], found["family"]) == ("deepseek-v3", "deepseek_v3")
    # arXiv 2412.19437: 671B stored, 37B active; released in FP8 with 41,540,496 scales; 70.272 KB of cache for a token.
    stored, active = found["parameters"]["stored"], found["parameters"]["active"]
    assert stored["without_prediction"] == 671_026_419_200
    assert stored["total"] == 671_026_419_200 + 11_610_068_224
    assert stored["block_scales"] == 41_540_496
    assert active["all"] == 37_552_297_472
    assert active["without_input_embedding"] == 36_625_618_432
    assert active["without_embeddings"] == 35_698_939_392
    assert found["kv_cache"]["bytes_per_token"] == 70_272
    assert found["asked"] == {"dtype": "fp8", "kv_dtype": "bfloat16", "context": 4096, "batch": 1}
    # arXiv 2505.09343, Table 2: 250 GFLOPs for each training token.
    assert found["compute"]["training"]["per_token"] == pytest.approx(250.5e9, rel=1e-3)
    assert found["compute"]["training"]["total"] == pytest.approx(14.8e12 * 250.5e9, rel=1e-3)


def test_four_bits_without_scales_take_half_a_byte_for_each_parameter(moekit: Moekit) -> None:
    found = planned(moekit, "deepseek-v3", "--dtype", "int4/none,embedding=int4/none,head=int4/none,router=int4/none")
    # 671B parameters at 4 bits are 335.5 GB; norms stay in bfloat16, selection biases in float32.
    assert found["memory"]["weights"]["total"] == pytest.approx(671_026_419_200 / 2, rel=1e-5)


def test_the_text_says_whether_it_fits(moekit: Moekit) -> None:
    said = moekit("plan", "deepseek-v3", "--device", "rtx-4090", "--dtype", "int4")
    assert said.status == 0
    sentence = planned(moekit, "deepseek-v3", "--device", "rtx-4090", "--dtype", "int4")["fit"]["sentence"]
    assert sentence in " ".join(said.out.split())
    assert "671,026,419,200 (671.0B)" in said.out
    assert re.search(r"│ routed +│ 653,908,770,816 │ +95.8% │ +20,434,649,088 │", said.out)


def test_explain_shows_every_figure_with_its_formula_and_the_numbers_in_it(moekit: Moekit) -> None:
    said = moekit("plan", "deepseek-v3", "--device", "h100-sxm", "--expert", "64", "--explain")
    assert said.status == 0
    text = " ".join(said.out.split())
    assert "stored, routed: 653,908,770,816 (653.9B)" in text
    assert "= 29696 x 2048 x 7168 + 14848 x 7168 x 2048" in text
    assert "distinct experts of a layer" in text and "redundant experts" in text


def test_the_header_says_what_was_planned_and_where_that_is_beyond_the_model(moekit: Moekit) -> None:
    head = moekit("plan", "tiny", "--context", "100000", "--kv-dtype", "fp8", "--batch", "3").out.splitlines()[0]
    assert head.startswith("model tiny")
    for part in ("weights bfloat16", "cache fp8", "context 100,000 tokens (the model is meant for 1,024)", "batch 3"):
        assert part in head


def test_models_and_variants_stand_side_by_side(moekit: Moekit) -> None:
    said = moekit("plan", "deepseek-v3", "--compare", "mixtral-8x7b", "glam-64b-64e")
    row = re.search(r"│ parameters: stored, without prediction +│(.*)│", said.out)
    assert row is not None and row[1].replace(" ", "") == "671.0B│46.7B│1.2T"
    models = planned(moekit, "deepseek-v3", "--compare", "mixtral-8x7b")["models"]
    assert [model["source"] for model in models] == ["deepseek-v3", "mixtral-8x7b"]
    assert models[1] == planned(moekit, "mixtral-8x7b")
    found = planned(moekit, "mixtral-8x7b", "--sweep", "n_routed=8,16")
    assert found["sweep"] == "n_routed=8,16"
    assert [model["source"] for model in found["models"]] == ["n_routed=8", "n_routed=16"]
    assert found["models"][0]["parameters"] == models[1]["parameters"]


def test_a_sweep_of_a_folder_starts_from_its_configuration(here: Path, moekit: Moekit) -> None:
    hub = {"model_type": "mixtral", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    hub |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    hub |= {"num_experts_per_tok": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text(json.dumps(hub), "utf-8")
    alone = planned(moekit, "mine")
    assert alone["parameters"]["stored"]["routed"] == 2 * 4 * 3 * 64 * 32
    for source in ("mine", "mine/config.json"):
        models = planned(moekit, source, "--sweep", "n_routed=4,8")["models"]
        assert models[0]["parameters"] == alone["parameters"]
        assert models[1]["parameters"]["stored"]["routed"] == 2 * 8 * 3 * 64 * 32


def test_whole_numbers_of_any_length_are_written(moekit: Moekit) -> None:
    (fine,) = planned(moekit, "deepseek-v3", "--sweep", "granularity=2048")["models"]
    assert re.fullmatch(r"\d\.\d{3}e\d{5}", fine["parameters"]["combinations"])
    assert moekit("plan", "deepseek-v3", "--sweep", "granularity=2048").status == 0


@pytest.mark.parametrize("name", preset_names())
def test_every_listed_model_is_planned_on_a_device_and_in_training(name: str, moekit: Moekit) -> None:
    found = planned(moekit, name, "--device", "h100-sxm", "--expert", "8", "--train", "--optimizer", "adamw")
    assert found["memory"]["training"]["total"] > found["parameters"]["stored"]["total"]
    assert moekit("plan", name, "--device", "h100-sxm", "--explain").status == 0


@pytest.mark.parametrize("name", devices())
def test_every_listed_device_is_planned_for(name: str, moekit: Moekit) -> None:
    found = planned(moekit, "deepseek-v2-lite", "--device", name, "--expert", "4")
    assert found["fit"]["devices"]["weights_alone"] >= 1
    assert found["speed"]["decode"]["tokens_per_second"] > 0


def test_the_lists_are_complete(moekit: Moekit) -> None:
    found = json.loads(moekit("plan", "--list", "--json").out)
    assert found["models"] == preset_names()
    assert found["devices"].keys() == devices().keys()
    text = moekit("plan", "--list").out
    assert all(name in text for name in [*preset_names(), *devices()])


def test_a_device_file_adds_devices(here: Path, moekit: Moekit) -> None:
    entry = '[mine]\nmemory_gb = 2\nbandwidth_gbs = 10\nrates_tflops = { float32 = 1 }\nsource = "a guess"\n'
    (here / "devices.toml").write_text(entry, "utf-8")
    found = planned(moekit, "tiny", "--device", "mine", "--device-file", "devices.toml")
    assert found["fit"]["fits"] is True
    assert "mine" in moekit("plan", "--list", "--device-file", "devices.toml").out


def test_the_page_replaces_the_old_one_in_a_folder_that_is_made(here: Path, moekit: Moekit) -> None:
    for name in ("deepseek-v3", "mixtral-8x7b"):
        assert moekit("plan", name, "--device", "rtx-4090", "--html", "pages/plan.html").status == 0
        assert f"<h1>{name}</h1>" in (here / "pages" / "plan.html").read_text("utf-8")
    assert [path.name for path in (here / "pages").iterdir()] == ["plan.html"]
    assert moekit("plan", "tiny", "--compare", "small", "--html", "pages/plan.html", "--json").status == 0
    assert "small" in (here / "pages" / "plan.html").read_text("utf-8")


@pytest.mark.parametrize("output", [[], ["--json"], ["--html", "plan.html"], ["--explain"], ["--compare", "tiny"]])
def test_neither_torch_nor_numpy_is_loaded(output: list[str], here: Path) -> None:
    loaded = modules_of("plan", "deepseek-v3", "--device", "rtx-4090", "--expert", "8", *output)
    assert "moekit.plan.study" in loaded
    # The charts of the page are numpy's; nothing else is heavy.
    heavy = {"torch", "transformers", "safetensors"} | (set() if "--html" in output else {"numpy"})
    assert not heavy & loaded
    assert ("rich" in loaded) == ("--json" not in output)


REFUSED: dict[str, tuple[str, ...]] = {
    "": ("name a model", "--list"),
    "deepseek-v33": ("deepseek-v33", "did you mean deepseek-v3"),
    "words.txt": ("words.txt",),
    "foreign": ("config.json",),
    "tiny --batch 0": ("--batch: 0",),
    "tiny --batch -1": ("--batch: -1",),
    "tiny --context 0": ("--context: 0",),
    "tiny --context 9999999999999": ("--context", "1,000,000,000,000"),
    "tiny --context 1e3": ("--context", "1e3"),
    "tiny --dtype int5": ("--dtype", "int5", "did you mean `int8`?"),
    "tiny --dtype routd=int4": ("--dtype", "routd", "did you mean `routed`?"),
    "tiny --kv-dtype nope": ("--kv-dtype", "nope", "known: float32"),
    "tiny --tokens 14.8X": ("--tokens 14.8X", "14.8T"),
    "tiny --tokens -1": ("--tokens -1",),
    "tiny --tokens 0": ("--tokens 0",),
    "tiny --tokens 99999999T": ("--tokens", "at most"),
    "tiny --device rtx-4091": ("rtx-4091", "did you mean `rtx-4090`?"),
    "glam-64b-64e --verify": ("--verify: glam-64b-64e", "a preset of a model"),
    "nowhere --verify": ("nowhere",),
    "tiny --verify --dtype int4": ("--dtype int4", "float32 and bfloat16"),
    "tiny --verify --compare small": ("--verify: tries one model",),
    "tiny --measure --device rtx-4090": ("--device rtx-4090", "this machine"),
    "tiny --device rtx-4090 --devices 0": ("--devices: 0",),
    "tiny --device rtx-4090 --prompt 0": ("--prompt: 0",),
    "tiny --device rtx-4090 --ram 5XB": ("--ram 5XB", "64GB"),
    "tiny --device rtx-4090 --ram 0GB": ("--ram 0GB",),
    "tiny --device rtx-4090 --ram-bandwidth nan": ("--ram-bandwidth nan",),
    "tiny --device rtx-4090 --disk-bandwidth -1": ("--disk-bandwidth -1",),
    "tiny --device rtx-4090 --hit-rate 1.5": ("--hit-rate: 1.5", "0 to 1"),
    "tiny --device rtx-4090 --expert 2 --redundant -1": ("--redundant: -1",),
    "tiny --device rtx-4090 --redundant 4": ("--redundant", "--expert"),
    "tiny --device rtx-4090 --devices 2 --ram 64GB": ("--ram", "several devices"),
    "tiny --device rtx-4090 --device-file nowhere.toml": ("nowhere.toml",),
    "tiny --device rtx-4090 --device-file words.txt": ("words.txt", "TOML"),
    "tiny --ram 64GB": ("--ram", "without --device"),
    "tiny --devices 2": ("--devices", "without --device"),
    "tiny --optimizer adamw": ("--optimizer", "without --train"),
    "tiny --train --optimizer sgd": ("--optimizer", "sgd"),
    "tiny --train --tokens-per-step 7": ("--tokens-per-step: 7", "1,024"),
    "tiny --expert 0": ("--expert: 0",),
    "tiny --expert 3 --data 2": ("--expert: 3", "data = 2"),
    "tiny --zero 4": ("--zero", "4"),
    "deepseek-v3 --device h100-sxm --expert 12": ("--expert: 12", "multiple of 8"),
    "tiny --compare nope": ("nope", "known: deepseek"),
    "tiny --compare": ("--compare",),
    "tiny --sweep n_routd=8": ("--sweep", "did you mean `n_routed`?"),
    "tiny --sweep n_routed=": ("--sweep", "n_routed=16,32,64"),
    "tiny --sweep n_routed=0": ("--sweep", "`moe.n_routed`: 0"),
    "tiny --sweep n_layers=99999999999": ("--sweep", "at most"),
    "grok-1 --sweep n_routed=8": ("--sweep", "grok-1"),
    "tiny --sweep n_routed=8 --compare small": ("--compare and --sweep",),
    "tiny --explain --compare small": ("--explain",),
    "tiny --html foreign": ("foreign", "is a folder"),
    "tiny --html words.txt/plan.html": ("words.txt", "no folder"),
    "tiny --html plan.html --compare nope": ("nope",),
    "tiny --devise rtx-4090": ("--devise", "did you mean `--device`?"),
    "tiny more": ("more",),
}


@pytest.mark.parametrize(("line", "words"), REFUSED.items(), ids=REFUSED.keys())
def test_nonsense_is_named_and_nothing_is_written(
    line: str, words: tuple[str, ...], here: Path, moekit: Moekit
) -> None:
    (here / "foreign").mkdir()
    (here / "foreign" / "config.json").write_text('{"model_type": "gpt2"}', "utf-8")
    before = contents(here)
    assert_refused(moekit("plan", *line.split()), *words)
    assert contents(here) == before


def test_a_page_that_cannot_be_written_leaves_no_piece_of_it(here: Path, moekit: Moekit) -> None:
    said = moekit("plan", "tiny", "--html", "/proc/moekit/plan.html")
    assert (said.status, said.out) == (1, "")


def test_this_machine_is_measured_and_predictions_are_tried_on_it(moekit: Moekit) -> None:
    said = moekit("plan", "tiny", "--verify", "--prompt", "16", "--json")
    assert said.status == 0
    assert said.err.startswith("measuring this machine\n")
    found = json.loads(said.out)
    assert found["fit"]["fits"] is True
    assert found["speed"]["decode"]["tokens_per_second"] > 0
    for work in ("decode", "prefill", "generation_memory", "training", "training_memory"):
        assert found["verify"][work]["measured"] > 0
