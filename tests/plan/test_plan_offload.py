"""Experts outside the device: published back-of-the-envelope numbers, and what placing and reading must conserve."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import card, computer, dense, preset

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.figure import Section
from moekit.plan.offload import offload
from moekit.plan.precision import FORMATS, parse_precision
from moekit.plan.step import decode_step

BFLOAT16 = FORMATS["bfloat16"]


def placed(
    blueprint: Blueprint,
    device: Device,
    ram: float = 0.0,
    disk_bandwidth: float = 7e9,
    hit_rate: float | None = None,
    dtype: str = "int4",
    context: int = 1,
    ram_bandwidth: float = 60e9,
) -> Section:
    precision = parse_precision(dtype)
    return offload(blueprint, precision, BFLOAT16, context, device, ram, ram_bandwidth, disk_bandwidth, hit_rate)


def test_deepseek_v3_on_a_24_gb_card_waits_for_the_disk() -> None:
    # 4.5 bits for each number; 60 % of the experts found in 24 GB and 64 GB of main memory; a disk of 7 GB/s.
    section = placed(preset("deepseek-v3"), card(24e9), 64e9, 7e9, 0.6, context=4096)
    assert section.value("expert_bytes") == 58 * 256 * 44_040_192 * 9 // 16  # 368 GB
    assert section.value("bytes_per_token.disk") == pytest.approx(0.4 * 464 * 44_040_192 * 9 / 16)
    assert round(section.value("bytes_per_token.disk") / 1e9, 1) == 4.6
    assert round(section.value("tokens_per_second.overlapped"), 1) == 1.5
    assert section.value("bound_by") == "disk"
    # The estimate says 22 % cached; it leaves embedding and head, here in bfloat16, at 4.5 bits, and the cache out.
    assert 20 < section.value("hit_rate_uniform") < 22
    assert "464 of 14,848 experts, 11.5 GB" in section.notes[0]


def test_deepseek_v3_in_400_gb_at_200_gb_per_second_is_bound_by_main_memory() -> None:
    # About 10 tokens/s with all weights at 4.5 bits; embedding and head in bfloat16 make it 9.
    everything = "int4,embedding=int4,head=int4,router=int4"
    section = placed(preset("deepseek-v3"), computer(400e9, 200e9), dtype=everything)
    assert section.value("fits")
    assert round(section.value("tokens_per_second.overlapped")) == 10
    assert section.value("bound_by") == "main memory"
    assert 9 < placed(preset("deepseek-v3"), computer(400e9, 200e9)).value("tokens_per_second.overlapped") < 9.5


def test_deepseek_v3_in_a_small_computer_is_slower_by_another_magnitude() -> None:
    # 24 GB of main memory and 1.2 GB/s of disk: 3 % of the experts, 0.1 tokens/s.
    section = placed(preset("deepseek-v3"), computer(24e9, 23e9), disk_bandwidth=1.2e9)
    assert round(section.value("hit_rate")) == 3
    assert round(section.value("tokens_per_second.overlapped"), 1) == 0.1


# Estimates for a computer that reads 23 to 32 GB/s: V2-Lite 13, OLMoE 28 to 45 tokens/s. The head of OLMoE is read in
# bfloat16 here, so that 45 is not reached.
@pytest.mark.parametrize(
    ("name", "bandwidth", "least", "most"),
    [("deepseek-v2-lite", 23e9, 13, 14), ("olmoe-1b-7b", 23e9, 28, 29), ("olmoe-1b-7b", 32e9, 39, 45)],
)
def test_small_models_are_bound_by_main_memory(name: str, bandwidth: float, least: float, most: float) -> None:
    section = placed(preset(name), computer(30e9, bandwidth))
    assert section.value("fits")
    assert least <= section.value("tokens_per_second.overlapped") <= most


memories = st.floats(0, 500e9)


@given(memories, memories, st.none() | st.floats(0, 1), st.booleans())
def test_every_expert_has_one_place_and_every_byte_one_way(
    on_device: float, ram: float, hit_rate: float | None, cpu: bool
) -> None:
    blueprint = preset("deepseek-v3")
    device = computer(on_device + 1, 60e9) if cpu else card(on_device)
    section = placed(blueprint, device, 0.0 if cpu else ram, hit_rate=hit_rate)
    assert sum(section.value(f"slots.{place}") for place in ("device", "ram", "disk")) == 58 * 256
    step = decode_step(blueprint, parse_precision("int4"), BFLOAT16, 1, 1)
    read = {place: section.value(f"bytes_per_token.{place}") for place in ("device", "ram", "disk")}
    # What comes from the disk crosses main memory.
    assert read["device"] + read["ram"] == pytest.approx(step.bytes)
    assert -1 <= read["disk"] <= read["ram"] + 1
    expert = 44_040_192 * 9 / 16
    held = sum(section.value(f"slots.{place}") for place in ("device", "ram")) * expert
    memory = section.value("memory_bytes")
    assert held + min(section.value("resident_bytes"), memory) <= memory + 1


@given(memories, memories)
def test_more_memory_is_never_slower(ram: float, more: float) -> None:
    small, large = (placed(preset("deepseek-v3"), card(24e9), size) for size in sorted((ram, ram + more)))
    for key in ("hit_rate", "tokens_per_second.overlapped", "tokens_per_second.serial"):
        assert large.value(key) >= small.value(key) * (1 - 1e-12)


def test_times_overlap_or_add_up() -> None:
    section = placed(preset("deepseek-v3"), card(24e9), 64e9)
    times = [section.value(f"seconds.{place}") for place in ("device", "ram", "disk")]
    assert section.value("seconds.serial") == sum(times)
    assert section.value("seconds.overlapped") == max(*times, section.value("seconds.compute"))


def test_a_model_that_fits_into_the_device_is_read_there() -> None:
    section = placed(preset("deepseek-v2-lite"), card(24e9))
    step = decode_step(preset("deepseek-v2-lite"), parse_precision("int4"), BFLOAT16, 1, 1)
    assert section.value("bytes_per_token.device") == pytest.approx(step.bytes)
    assert section.value("seconds.overlapped") == pytest.approx(step.bytes / 1000e9)


def test_copying_experts_to_the_device_takes_the_link_to_the_host() -> None:
    section = placed(preset("deepseek-v3"), card(24e9), 400e9)
    assert section.value("seconds.copied") == pytest.approx(section.value("bytes_per_token.ram") / 32e9)


def test_without_a_rate_the_share_that_is_held_is_found() -> None:
    section = placed(preset("deepseek-v3"), card(24e9), 64e9)
    held = section.value("slots.device") + section.value("slots.ram")
    assert section.value("hit_rate") == pytest.approx(100 * held / (58 * 256))


def test_what_is_held_whole_is_always_found_and_what_is_not_held_never() -> None:
    blueprint = preset("deepseek-v2-lite")
    whole = placed(blueprint, card(24e9), hit_rate=0.3)
    assert (whole.value("hit_rate"), whole.value("bytes_per_token.disk")) == (100, 0)
    nothing = placed(blueprint, card(1e6), hit_rate=0.3)
    assert nothing.value("hit_rate") == 0
    # Not even what every token needs is there: all but the megabyte comes from the disk.
    step = decode_step(blueprint, parse_precision("int4"), BFLOAT16, 1, 1)
    assert nothing.value("bytes_per_token.disk") == pytest.approx(step.bytes, rel=1e-3)
    assert not nothing.value("fits")


def test_it_fits_exactly_when_nothing_is_missing() -> None:
    blueprint = preset("deepseek-v2-lite")
    needed = sum(placed(blueprint, card(1e9)).value(key) for key in ("resident_bytes", "expert_bytes"))
    for spare in (-1, 0, 1):
        section = placed(blueprint, card(needed + spare))
        assert section.value("fits") == (spare >= 0)
        assert section.value("missing_bytes") == max(0, -spare)


def test_a_computer_has_the_memory_that_is_given() -> None:
    machine = computer(1000e9, 200e9)
    assert placed(preset("deepseek-v3"), machine).value("fits")
    small = placed(preset("deepseek-v3"), machine, ram=64e9)
    assert (small.value("memory_bytes"), small.value("fits")) == (64e9, False)


def test_a_model_without_experts_has_nothing_to_place() -> None:
    section = placed(dense(), card())
    assert not section.figures
    assert "nothing to place" in section.notes[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", 0),
        ("ram", -1.0),
        ("ram", float("nan")),
        ("ram_bandwidth", 0.0),
        ("disk_bandwidth", -7e9),
        ("hit_rate", 1.5),
        ("hit_rate", -0.1),
        ("hit_rate", float("nan")),
    ],
)
def test_numbers_that_cannot_be_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        placed(preset("deepseek-v2-lite"), card(), **{key: value})  # type: ignore[arg-type]
