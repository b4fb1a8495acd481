import re
from pathlib import Path

import pytest

from moekit.config.errors import InputError
from moekit.plan.devices import device_named, devices

MINE = """
[mine]
memory_gb = 10
bandwidth_gbs = 100
rates_tflops = { float32 = 1, float16 = 2 }
"""


def test_every_device_names_a_document_and_its_date() -> None:
    for device in devices().values():
        assert device.source
        assert re.fullmatch(r"20\d\d-\d\d", device.date), device.name


def test_a_wider_type_is_never_faster() -> None:
    for device in devices().values():
        rates = [device.rate(name) for name in ("fp8", "bfloat16", "float16", "float32")]
        assert rates[0] >= rates[1]
        assert min(rates[1:3]) >= rates[3] > 0, device.name


def test_links_get_slower_with_distance() -> None:
    for device in devices().values():
        reached = [device.links[key] for key in ("peer", "network") if key in device.links]
        assert sorted(reached, reverse=True) == reached, device.name
        assert device.bandwidth >= max(device.links.values())


def test_h800_has_the_links_of_the_paper() -> None:
    """arXiv 2412.19437, section 3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s, nodes of 8."""
    device = device_named("h800")
    assert (device.links["peer"], device.links["network"], device.per_node) == (160e9, 50e9, 8)


def test_memory_is_decimal() -> None:
    assert device_named("rtx-4090").memory == 24_000_000_000


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", " Rtx-4090 "])
def test_spelling_does_not_matter(name: str) -> None:
    assert device_named(name) == device_named("rtx-4090")


def test_a_type_that_a_device_lacks_runs_at_the_rate_of_the_next_wider() -> None:
    card = device_named("t4")
    assert card.rate("fp8") == card.rate("bfloat16") == card.rate("float16") == 65e12


def test_an_unknown_device_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="rtx 4091") as error:
        device_named("rtx 4091")
    assert "rtx-4090" in error.value.hint


def test_a_file_adds_devices_and_replaces_single_values(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(MINE + "[RTX_4090]\nmemory_gb = 48\nrates_tflops = { fp8 = 1 }\n", "utf-8")
    mine, changed, known = device_named("Mine", file), device_named("rtx-4090", file), device_named("rtx-4090")
    assert (mine.memory, mine.bandwidth, mine.rate("fp8"), mine.links) == (10 * 10**9, 100e9, 2e12, {})
    assert changed == known._replace(memory=48 * 10**9, rates={**known.rates, "fp8": 1e12})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[mine]\nmemory_gb = 1\n", "mine.bandwidth_gbs"),
        (MINE + "memry_gb = 1\n", "mine.memry_gb"),
        (MINE.replace("float32 = 1", "float33 = 1"), "mine.rates_tflops.float33"),
        (MINE.replace("float32 = 1, ", ""), "mine.rates_tflops.float32"),
        (MINE.replace("= 100", "= -100"), "mine.bandwidth_gbs"),
        (MINE.replace("= 100", "= inf"), "mine.bandwidth_gbs"),
        (MINE.replace("= 100", '= "fast"'), "mine.bandwidth_gbs"),
        (MINE + 'kind = "tpu"\n', "mine.kind"),
        ("mine = 3\n", "mine"),
        ("[rtx-4090.links_gbs]\npeers = 1\n", "rtx-4090.links_gbs.peers"),
        ("[mine\n", "TOML"),
    ],
)
def test_a_wrong_file_names_itself_and_the_key(text: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError) as error:
        devices(file)
    assert str(file) in str(error.value)
    assert key in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        devices(tmp_path / "none.toml")
