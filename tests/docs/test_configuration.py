"""The page of all configuration keys is what the models say."""

import pytest

from docs.configuration import PAGE, Reference, Row, Table, page


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, Row]]:
    """Every line, with the heading it stands under."""

    def lines(table: Table) -> list[tuple[str, Row]]:
        below = [line for kind in table.kinds for line in lines(kind)]
        return [*((table.title, row) for row in table.rows), *below]

    reference = Reference()
    return [line for table in (reference.file, *reference.sections) for line in lines(table)]


def row(rows: list[tuple[str, Row]], key: str, title: str | None = None) -> Row:
    (found,) = [one for under, one in rows if one.key == key and title in (None, under)]
    return found


def test_the_page_is_what_the_models_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: make docs"


def test_every_key_is_described(rows):
    assert [one.key for _, one in rows if not one.text] == []


def test_types_are_told_in_words(rows):
    takes = {one.key: one.takes for _, one in rows}
    assert takes["train.batch"] == "whole number, at least 1"
    assert takes["serve.port"] == "whole number, 1 to 65535"
    assert takes["train.recipe.beta1"] == "number, at least 0 and below 1"
    assert takes["train.precision"] == "`float32` or `bfloat16`"
    assert takes["embed.text"] == "`web_text`, `caption` or `description`, or null"
    assert takes["serve.remote.hosts"] == "list of texts, not empty"
    assert takes["evaluation.classification"] == "list of sections"
    assert takes["evaluation.classification.N.name"].startswith("text that matches")


def test_a_default_is_that_of_the_section_that_a_key_stands_in(rows):
    assert row(rows, "captioning.sampling.max_tokens").default == "`160`"
    assert row(rows, "synthesis.sampling.max_tokens").default == "`96`"
    assert row(rows, "storage.uri").default == "required"
    assert row(rows, "storage.s3.endpoint").default == "absent"


def test_every_kind_has_its_own_keys(rows):
    kinds = row(rows, "synthesis.engine.kind")
    assert kinds.takes == "`http` or `vllm`"
    row(rows, "synthesis.engine.chunks_in_flight", "synthesis.engine, kind: vllm")
    row(rows, "synthesis.engine.url", "synthesis.engine, kind: http")
    for kind in ("parquet", "hf_parquet"):
        row(rows, "train_data.source.beside.path", f"train_data.source, kind: {kind}")
