"""What is held out is never learned from."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moekit.data.sampling import spread, spread_pieces
from moekit.data.split import at_most, hold_out

documents = st.lists(st.text(alphabet="ab神 \n", min_size=1, max_size=20), min_size=1, max_size=30)
shares = st.floats(0.01, 0.99)


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


@given(documents, shares, st.integers(4, 200))
def test_something_is_held_out_within_the_limit_and_never_trained_on(texts, share, limit):
    train, valid = hold_out(texts, share, limit)
    assert valid and all(valid) and size(valid) <= limit
    if set(valid) <= set(texts) and len(set(texts)) > 1:
        assert not set(valid) & set(train) or len(valid) == 1
    assert size(train) + size(valid) <= size(texts)


@given(st.sets(st.text(min_size=1, max_size=20), min_size=2, max_size=40), shares)
def test_different_documents_are_split_without_loss_in_their_order(texts, share):
    texts = sorted(texts)
    train, valid = hold_out(texts, share, 10**6)
    assert sorted(train + valid) == texts
    assert train == sorted(train) and valid == sorted(valid)
    assert len(valid) == min(max(1, round(share * len(texts))), len(texts) - 1)


def test_the_choice_hardly_changes_when_documents_come_or_go():
    texts = [f"document {number}" for number in range(1000)]
    before = set(hold_out(texts, 0.1, 10**6).valid)
    after = set(hold_out(texts[50:], 0.1, 10**6).valid)
    assert len(before & after) >= 85


def test_copies_of_a_document_are_on_one_side():
    texts = [f"document {number % 10}" for number in range(100)]
    train, valid = hold_out(texts, 0.3, 10**6)
    assert len(valid) == 3 and not set(train) & set(valid)


def test_a_single_document_is_cut_at_its_end():
    assert hold_out(["abcdefghij"], 0.2, 100) == (["abcdefgh"], ["ij"])
    assert hold_out(["abcdefghij"], 0.5, 2) == (["abcdefgh"], ["ij"])
    assert hold_out(["一二三四五"], 0.5, 4) == (["一二三四"], ["五"])


def test_documents_above_the_limit_stay_in_training():
    long = ["x" * 1000 + str(number) for number in range(20)]
    short = ["one", "two", "three"]
    train, valid = hold_out([*long, *short], 0.95, 50)
    assert valid and set(valid) <= set(short) and set(long) <= set(train)


def test_where_all_are_above_the_limit_the_end_of_one_is_held_out():
    long = ["x" * 1000 + str(number) for number in range(20)]
    train, valid = hold_out(long, 0.5, 50)
    assert size(valid) == 50 and len(train) == 20 and size(train) == size(long) - 50


@given(documents, st.integers(4, 100))
def test_a_validation_file_is_read_up_to_the_limit(texts, limit):
    kept = at_most(texts, limit)
    assert kept and size(kept) <= limit
    assert kept == texts[: len(kept)] or (len(kept) == 1 and texts[0].startswith(kept[0]))


@given(documents, st.integers(0, 300))
def test_a_spread_is_a_subsequence_within_the_limit(texts, limit):
    kept = spread(texts, limit)
    rest = iter(texts)
    assert all(text in rest for text in kept)
    assert size(kept) <= limit
    assert kept == texts or size(texts) > limit


def test_a_spread_comes_from_beginning_to_end():
    texts = [f"{number:04}" for number in range(1000)]
    kept = [int(text) for text in spread(texts, 400)]
    assert len(kept) == 100 and max(b - a for a, b in pairwise(kept)) <= 11
    assert size(spread_pieces(["ab" * 5000], 5000)) in range(4000, 5001)
