import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_shapes import published, windowed

from moekit.config.errors import ConfigError
from moekit.plan.devices import Device, device_named
from moekit.plan.fit import USABLE, fit, largest_context, read_per_token
from moekit.plan.memory import cache_bytes
from moekit.plan.precision import FORMATS, parse_precision

BF16 = FORMATS["bfloat16"]
PLAIN4 = "int4/none,embedding=int4/none,head=int4/none,router=int4/none"


def card(memory: int) -> Device:
    return Device("card", "gpu", memory, 1e12, {"float32": 1e12}, {}, 1, 0.0, "a test", "2026-01")


@pytest.mark.parametrize(
    ("precision", "device", "cards"),
    [(PLAIN4, "rtx-4090", 14), ("int4", "rtx-4090", 16), ("int8/none", "a100-80gb", 9), ("bfloat16", "a100-80gb", 17)],
)
def test_cards_for_the_weights_of_deepseek_v3(precision: str, device: str, cards: int) -> None:
    """671.03 B parameters: 335.5 GB at 4 bits without scales / 24; 377 to 380 with scales; 671 / 80; 1342 / 80."""
    section = fit(published("deepseek-v3"), parse_precision(precision), BF16, 4096, 1, device_named(device))
    assert section.value("devices.weights_alone") == cards


def test_a_token_of_deepseek_v3_reads_11_5_gigabytes_of_experts_at_four_and_a_half_bits() -> None:
    """8 experts of 44,040,192 in each of 58 layers."""
    shape = published("deepseek-v3")
    routed = shape._replace(weights=tuple(w for w in shape.weights if w.part == "routed"))
    assert read_per_token(routed, parse_precision("int4")) == 8 * 58 * 44_040_192 * 4.5 / 8


def test_a_token_reads_one_row_of_the_embedding() -> None:
    """4 q, 16 and 8 expert matrices, 4 biases of float32, the tied head, one row of 16."""
    numbers = 4 * 32 * 16 + 24 * 128 + 100 * 16 + 16
    assert read_per_token(windowed(), parse_precision("bfloat16")) == 2 * numbers + 4 * 4 * 8


@given(st.integers(0, 200_000))
def test_the_largest_context_is_the_last_whose_cache_fits(room: int) -> None:
    longest = largest_context(windowed(), BF16, room)
    assert longest is not None
    assert longest == 0 or cache_bytes(windowed(), BF16, longest, 1) <= room
    assert cache_bytes(windowed(), BF16, longest + 1, 1) > room


def test_windows_in_all_layers_leave_no_limit() -> None:
    shape = windowed()._replace(attentions=windowed().attentions[:1])
    most = cache_bytes(shape, BF16, 8, 1)
    assert largest_context(shape, BF16, most) is None
    assert largest_context(shape, BF16, most - 1) == 7


def test_a_model_that_keeps_nothing_has_no_limit() -> None:
    shape = windowed()._replace(attentions=(), vocab_size=0)
    section = fit(shape, parse_precision("int4"), BF16, 16, 1, card(10**9))
    assert (section.value("largest_context"), section.value("largest_batch")) == (None, None)


@pytest.mark.parametrize("context", [1, 4096, 50_000])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_largest_context_and_batch_fit_and_one_more_does_not(context: int, batch: int) -> None:
    shape, precision, device = published("deepseek-v2-lite"), parse_precision("bfloat16"), device_named("a100-40gb")

    def fits(context: int, batch: int) -> bool:
        return fit(shape, precision, BF16, context, batch, device).value("fits")

    section = fit(shape, precision, BF16, context, batch, device)
    longest, most = section.value("largest_context"), section.value("largest_batch")
    assert fits(longest, batch)
    assert not fits(longest + 1, batch)
    assert fits(context, most)
    assert not fits(context, most + 1)


def test_it_fits_exactly_when_there_are_as_many_devices_as_needed() -> None:
    shape, precision = published("deepseek-v3"), parse_precision("int4")
    for device in (device_named("rtx-4090"), device_named("h200")):
        needed = fit(shape, precision, BF16, 4096, 4, device).value("devices.with_cache")
        assert fit(shape, precision, BF16, 4096, 4, device, needed).value("fits")
        assert not fit(shape, precision, BF16, 4096, 4, device, needed - 1).value("fits")


def test_what_breaks_is_the_first_part_that_passes_the_limit() -> None:
    shape, precision = published("deepseek-v2-lite"), parse_precision("bfloat16")
    section = fit(shape, precision, BF16, 4096, 1, card(10**12))
    assert (section.value("fits"), section.value("breaks")) == (True, None)
    held = 0
    for part in ("weights", "cache", "logits", "working_set"):
        # One byte less of usable memory than this part needs together with those before it.
        held += section.value(f"needs.{part}")
        small = fit(shape, precision, BF16, 4096, 1, card(int((held - 1) / USABLE)))
        assert (small.value("fits"), small.value("breaks")) == (False, part)


def test_a_device_too_small_for_its_working_set_is_never_enough() -> None:
    section = fit(published("deepseek-v3"), parse_precision("int4"), BF16, 4096, 1, card(10**6), 10**6)
    assert section.value("devices.with_cache") is None
    assert not section.value("fits")
    assert (section.value("largest_context"), section.value("largest_batch")) == (0, 0)


def test_the_sentence_holds_size_format_card_and_numbers_of_cards() -> None:
    section = fit(published("deepseek-v3"), parse_precision("int4"), BF16, 4096, 1, device_named("rtx-4090"))
    assert section.value("sentence") == (
        "The 671.0B parameters of deepseek-v3 need 380.3 GB as int4; rtx-4090 has 24.0 GB: 16 for the weights alone, "
        "19 with cache and working set. One token reads 22.1 GB of them."
    )


@pytest.mark.parametrize(("key", "sizes"), [("context", (0, 1, 1)), ("batch", (1, 0, 1)), ("n_devices", (1, 1, 0))])
def test_sizes_below_one_are_errors_that_name_them(key: str, sizes: tuple[int, int, int]) -> None:
    context, batch, number = sizes
    with pytest.raises(ConfigError) as error:
        fit(windowed(), parse_precision("int4"), BF16, context, batch, card(10**9), number)
    assert error.value.key == key
