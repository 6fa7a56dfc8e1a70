"""Answers: what the schemas accept, and what is read out of good and bad texts."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_clip.descriptions import (
    CAPTION_SCHEMA,
    DESCRIPTION_SCHEMA,
    AnswerError,
    Caption,
    parse_caption,
    parse_description,
)

# What xgrammar compiles, of the keywords that a schema of strings and lists could use.
SUPPORTED = {
    *("type", "properties", "required", "additionalProperties", "items"),
    *("minLength", "maxLength", "minItems", "maxItems"),
}


def keywords(schema):
    for key, value in schema.items():
        yield key
        if key == "properties":
            for inner in value.values():
                yield from keywords(inner)
        elif isinstance(value, dict):
            yield from keywords(value)


@pytest.mark.parametrize("schema", [DESCRIPTION_SCHEMA, CAPTION_SCHEMA])
def test_schemas_are_valid_and_use_supported_keywords_only(schema):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(keywords(schema)) <= SUPPORTED
    json.dumps(schema)


@pytest.mark.parametrize(
    ("schema", "answer", "valid"),
    [
        (DESCRIPTION_SCHEMA, {"description": "a dog"}, True),
        (DESCRIPTION_SCHEMA, {"description": ""}, False),
        (DESCRIPTION_SCHEMA, {"description": "x" * 1000}, False),
        (DESCRIPTION_SCHEMA, {"description": "a dog", "more": 1}, False),
        (DESCRIPTION_SCHEMA, {}, False),
        (CAPTION_SCHEMA, {"caption": "a dog", "tags": ["dog"]}, True),
        (CAPTION_SCHEMA, {"caption": "a dog", "tags": []}, True),
        (CAPTION_SCHEMA, {"caption": "a dog"}, False),
        (CAPTION_SCHEMA, {"caption": "a dog", "tags": ["dog"] * 100}, False),
        (CAPTION_SCHEMA, {"caption": "a dog", "tags": [""]}, False),
    ],
)
def test_schemas_hold_an_answer_to_its_form(schema, answer, valid):
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(schema).is_valid(answer) is valid


@pytest.mark.parametrize(
    "text",
    [
        '{"description": "A dog."}',
        ' \n{"description":"A\\n dog."}\n',
        '```json\n{"description": "A dog."}\n```',
        '```\n{"description": "A dog."}```',
        'Sure! {"description": "A dog."} I hope this helps.',
        '{"confidence": 1, "description": "A dog."}',
        '{"description": "A\\ud800 dog."}',
    ],
)
def test_a_description_is_read(text):
    assert parse_description(text) == "A dog."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ('{"description": ""}', "empty"),
        ('{"description": " \\n "}', "empty"),
        ("A dog.", "not_json"),
        ("{'description': 'A dog.'}", "not_json"),
        ('{"description": ' + "[" * 200_000, "truncated"),
        ('{"description": ' + "[" * 90_000 + "x", "not_json"),
        ('{"description": ' + "9" * 5000 + "}", "not_json"),
        ('{"description": "A do', "truncated"),
        ('```json\n{"description": "A dog."', "truncated"),
        ('{"description"', "truncated"),
        ("{", "truncated"),
        ("{}", "missing_field"),
        ('{"caption": "A dog."}', "missing_field"),
        ('{"description": ["A dog."]}', "wrong_type"),
        ('{"description": null}', "wrong_type"),
        ('{"description": NaN}', "wrong_type"),
    ],
)
def test_a_bad_answer_is_refused_with_its_reason(text, reason):
    with pytest.raises(AnswerError) as refusal:
        parse_description(text)
    assert refusal.value.reason in {reason} | ({"not_json"} if "[[" in text else set())


def test_caption_and_tags_are_read_cleaned_and_unique():
    answer = {"caption": " A dog\non <b>sand</b>. ", "tags": ["dog", "dog", "", " sea\n"]}
    assert parse_caption(json.dumps(answer)) == Caption("A dog on sand .", ("dog", "sea"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"caption": "a dog"}, "missing_field"),
        ({"tags": []}, "missing_field"),
        ({"caption": "a dog", "tags": "dog"}, "wrong_type"),
        ({"caption": "a dog", "tags": [1]}, "wrong_type"),
        ({"caption": 1, "tags": []}, "wrong_type"),
        ({"caption": "<b>", "tags": []}, "empty"),
    ],
)
def test_a_bad_caption_is_refused_with_its_reason(answer, reason):
    with pytest.raises(AnswerError) as refusal:
        parse_caption(json.dumps(answer))
    assert refusal.value.reason == reason


def test_a_refusal_travels_between_processes():
    error = pickle.loads(pickle.dumps(AnswerError("truncated", "at character 7")))
    assert (error.reason, error.detail) == ("truncated", "at character 7")
    assert str(error) == "truncated: at character 7"


@given(st.text() | st.text(alphabet='{}[]",:0truefalsenl \\ud'))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_description, parse_caption):
        try:
            parse(text)
        except AnswerError as refusal:
            assert str(refusal).startswith(refusal.reason)


@given(st.text(min_size=1))
def test_what_was_written_is_what_is_read(description):
    line = " ".join(description.split())
    if line:
        assert parse_description(json.dumps({"description": description})) == line
