"""Every rule is in the docs and in the help, in the words of its author."""

from pathlib import Path

import pytest

from moekit.cli.main import main
from moekit.config.catalogue import CHAPTERS, kind_of, page, settings, summary

ROOT = Path(__file__).parents[2]
RULES = [rule for chapter in CHAPTERS for rule in chapter.rules]
PACKAGE = ROOT / "src" / "moekit"


def test_the_page_of_rules_is_written_from_the_configuration() -> None:
    assert (ROOT / "docs" / "rules.md").read_text("utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.title)
def test_each_rule_has_a_kind_of_its_own_and_a_file_where_the_page_says(chapter) -> None:
    kinds = [kind_of(rule) for rule in chapter.rules]
    assert len(set(kinds)) == len(kinds)
    assert [kind for kind in kinds if not (PACKAGE / chapter.place.format(kind=kind)).is_file()] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_and_each_of_its_settings_is_explained(rule: type) -> None:
    assert summary(rule)
    assert not [name for name, _, text in settings(rule) if not text]


def test_the_help_of_training_names_every_rule(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = {tuple(line.split(maxsplit=1)) for line in capfd.readouterr().out.splitlines() if line.strip()}
    assert not [kind_of(rule) for rule in RULES if (kind_of(rule), summary(rule)) not in lines]
