"""One vocabulary: patterns, docs, and (with a real run) that nothing is logged beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cheapertraining.observe.vocabulary import GROUPS, VOCABULARY, find, markdown, table

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.mark.parametrize(
    ("name", "pattern", "places"),
    [
        ("loss/train/total", "loss/train/total", ()),
        ("loss/train/code", "loss/train/{source}", ("code",)),
        (
            "metrics/heldout/a.b/TokenCrossEntropy",
            "metrics/{split}/TokenCrossEntropy",
            ("heldout/a.b",),
        ),
        ("mixture/score/code/wiki", "mixture/score/{direction}/{source}", ("code", "wiki")),
        ("mixture/score_se/code/wiki", "mixture/score_se/{direction}/{source}", ("code", "wiki")),
        ("lr-AdamW/group1", "lr-{optimizer}/group{group}", ("AdamW", "1")),
        ("time/train", "time/train", ()),
        ("time/token_in_epoch", "time/{stat}", ("token_in_epoch",)),
        ("throughput/device/mfu", "throughput/device/{what}", ("mfu",)),
    ],
)
def test_names_are_found(name: str, pattern: str, places: tuple[str, ...]) -> None:
    entry = find(name)
    assert entry is not None
    assert (entry.pattern, entry.match(name)) == (pattern, places)


def test_foreign_names_are_not_found() -> None:
    assert find("mixture/wieght/code") is None
    assert find("loss") is None


def test_entries_are_complete_and_distinct() -> None:
    assert len({entry.pattern for entry in VOCABULARY}) == len(VOCABULARY)
    assert {entry.group for entry in VOCABULARY} == set(GROUPS)
    assert all(entry.unit and entry.description.endswith(".") for entry in VOCABULARY)


def test_table_keeps_the_order_of_the_vocabulary() -> None:
    names = ["mixture/weight/b", "loss/train/total", "mixture/weight/a", "foreign"]
    found = {"loss/train/total": names[1:2], "mixture/weight/{source}": ["mixture/weight/b", "mixture/weight/a"]}
    assert table(names) == found


def test_docs_have_the_vocabulary_as_it_is() -> None:
    assert markdown().strip() in DOCS.read_text(encoding="utf-8"), (
        "docs/metrics.md: put in what `python -m cheapertraining.observe.vocabulary` prints"
    )
