"""What becomes of one pair, whatever the model answers."""

import asyncio
import json
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.synthesis.describer import Describing
from ray_jobs.synthesis.task import GenerationError, SamplingConfig, attempt_seed

PAIR = {
    "id": "u1f436",
    "web_text": "cute DOG face.png",
    "caption": "dog face",
    "tags": ["dog", "face", "animals"],
    "description": None,
}
GROUNDED = json.dumps({"description": "A cute dog's face."})
INVENTED = json.dumps({"description": "A dog on a red sofa."})


class Model:
    """Gives these answers in turn, and remembers the seeds it was asked with."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.seeds: list[int] = []

    async def __call__(self, messages: Any, seed: int) -> str:
        self.seeds.append(seed)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def described(model: Model, variants: int = 1, **changes: Any) -> dict[str, Any]:
    task = Describing(SamplingConfig(seed=5), variants)
    return asyncio.run(task({**PAIR, **changes}, model))


def test_a_grounded_answer_is_kept():
    model = Model(GROUNDED)
    row = described(model)
    assert row["description"] == "A cute dog's face."
    assert (row["description_source"], row["attempts"]) == ("llm", 1)
    assert row["seed"] == attempt_seed(5, PAIR["id"], 0) == model.seeds[0]


def test_an_ungrounded_answer_is_asked_for_again_with_another_seed():
    model = Model(INVENTED, GROUNDED)
    row = described(model)
    assert (row["description_source"], row["attempts"]) == ("llm", 2)
    assert model.seeds[0] != model.seeds[1] == row["seed"]


@pytest.mark.parametrize(
    ("answers", "reason", "refused"),
    [
        ((INVENTED, INVENTED), "unsupported_word", "A dog on a red sofa."),
        ((INVENTED, "no JSON"), "answer_not_json", "no JSON"),
        ((GROUNDED[:-8], GROUNDED[:-8]), "answer_truncated", GROUNDED[:-8]),
        ((GenerationError("too long"),) * 2, "generation_error", "too long"),
    ],
    ids=["ungrounded", "no JSON", "cut", "refused by the engine"],
)
def test_a_sentence_of_caption_and_tags_serves_in_the_end(answers, reason, refused):
    row = described(Model(*answers))
    assert row["description_source"] == f"fallback: {reason}"
    assert row["guard_reason"] == reason
    assert row["refused_text"] == refused
    assert "dog face" in row["description"].lower()
    assert row["attempts"] == 2


@pytest.mark.parametrize("answer", ["half \ud83d", GenerationError("half \ud83d")])
def test_half_a_character_pair_in_a_refused_answer_can_be_stored(answer):
    row = described(Model(answer, answer))
    assert row["refused_text"] == "half ?"
    pa.Table.from_pylist([row], schema=Describing.schema)


def test_an_endless_answer_is_kept_in_part():
    assert len(described(Model(*["no JSON " * 10_000] * 2))["refused_text"]) == 2000


def test_what_the_guard_missed_support_for_is_kept_for_the_report():
    assert {"red", "sofa"} <= set(described(Model(INVENTED, INVENTED))["guard_unsupported"])


def test_a_pair_without_anything_to_say_has_no_description():
    row = described(Model(INVENTED, INVENTED), web_text="", caption=None, tags=None)
    assert row["description"] is None
    assert row["description_source"].startswith("none: ")


def test_a_description_that_is_there_is_kept_and_nothing_is_asked():
    row = described(Model(), description="What someone wrote.")
    assert row["description"] == "What someone wrote."
    assert (row["description_source"], row["attempts"]) == ("given", 0)


def test_variants_are_distinct_descriptions_by_seeds_of_their_own():
    other = json.dumps({"description": "The face of a dog."})
    model = Model(INVENTED, GROUNDED, other, GROUNDED)  # one is asked again
    row = described(model, variants=3)
    assert {row["description"], *row["alternatives"]} == {
        "A cute dog's face.",
        "The face of a dog.",
    }
    assert row["attempts"] == 4
    assert len(set(model.seeds)) == 4


def test_a_variant_that_is_kept_goes_before_one_that_is_not():
    row = described(Model(INVENTED, INVENTED, GROUNDED), variants=2)
    assert (row["description_source"], row["alternatives"]) == ("llm", None)


def test_seeds_differ_between_pairs_attempts_and_runs():
    seeds = {attempt_seed(s, i, a) for s in range(3) for i in ("a", "b", "c") for a in range(3)}
    assert len(seeds) == 27
