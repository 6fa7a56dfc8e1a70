"""The rule by which one model follows another."""

import pytest

from serve.messages import ModelPlace, Orders, Report, Tower
from serve.succession import Succession

ONE, TWO, THREE = (
    ModelPlace("small", str(version), f"models:/small/{version}") for version in "123"
)


@pytest.fixture
def succession() -> Succession:
    made = Succession(ONE, keep_seconds=60)
    for tower in ("image", "text"):
        assert say(made, tower).current == ONE
    return made


def say(
    succession: Succession,
    tower: Tower,
    *holds: ModelPlace,
    now: float = 0.0,
    replica: str = "a",
    refused: dict[ModelPlace, str] | None = None,
) -> Orders:
    refusals = tuple((refused or {}).items())
    report = Report(tower, replica, ONE if ONE in holds else None, holds, refusals)
    return succession.report(report, now)


def test_the_next_model_is_served_when_every_replica_has_it(succession):
    succession.want(TWO, 0)
    assert say(succession, "image", ONE).hold == (ONE, TWO)
    say(succession, "image", ONE, TWO)
    say(succession, "image", ONE, replica="b")
    assert say(succession, "text", ONE, TWO).current == ONE
    assert succession.standing().coming == TWO
    orders = say(succession, "image", ONE, TWO, replica="b", now=5)
    assert orders == Orders(TWO, (TWO, ONE))  # requests that began on the first one go on
    assert say(succession, "text", ONE, TWO, now=64).hold == (TWO, ONE)
    assert say(succession, "text", ONE, TWO, now=66).hold == (TWO,)


def test_a_replica_that_is_gone_is_not_waited_for(succession):
    succession.want(TWO, 0)
    say(succession, "image", ONE, replica="b", now=1)
    say(succession, "image", ONE, TWO, now=10)
    assert say(succession, "text", ONE, TWO, now=10).current == ONE
    assert say(succession, "text", ONE, TWO, now=17).current == TWO


def test_a_tower_without_replicas_is_waited_for():
    succession = Succession(ONE, keep_seconds=60)
    say(succession, "image", ONE)
    succession.want(TWO, 0)
    assert say(succession, "image", ONE, TWO).current == ONE


def test_what_one_replica_refuses_is_loaded_by_none(succession):
    succession.want(TWO, 0)
    say(succession, "image", ONE, TWO)
    orders = say(succession, "text", ONE, refused={TWO: "it is broken"})
    assert orders == Orders(ONE, (ONE,))
    assert succession.standing().refused == (("2", "it is broken"),)
    succession.want(TWO, 30)  # the registry says so still
    assert succession.standing().coming is None
    succession.want(TWO, 61)  # what it came from may be mended
    assert succession.standing().coming == TWO


def test_a_refusal_is_forgotten_with_the_next_model(succession):
    succession.want(TWO, 0)
    say(succession, "text", ONE, refused={TWO: "it is broken"})
    succession.want(THREE, 1)
    for tower in ("image", "text"):
        orders = say(succession, tower, ONE, THREE, now=2)
    assert orders.current == THREE
    assert succession.standing().refused == ()


def test_pointing_back_ends_an_exchange_that_was_under_way(succession):
    succession.want(TWO, 0)
    succession.want(ONE, 1)
    assert say(succession, "image", ONE, TWO).hold == (ONE,)


def test_what_is_wanted_before_a_replica_asks_is_served_at_once():
    succession = Succession(ONE, keep_seconds=60)
    succession.want(TWO, 0)
    assert say(succession, "image") == Orders(TWO, (TWO,))
    succession.want(THREE, 1)
    assert say(succession, "text") == Orders(TWO, (TWO, THREE))


def test_a_new_director_begins_with_what_is_served():
    succession = Succession(TWO, keep_seconds=60)
    assert say(succession, "image", ONE).current == ONE
    assert say(succession, "text").current == ONE
