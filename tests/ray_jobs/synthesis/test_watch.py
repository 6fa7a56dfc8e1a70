"""What is remembered of engines that ended, and what follows from it."""

import threading

from ray_jobs.synthesis.watch import (
    CAREFUL_BEGIN,
    MAX_FINDING_DEATHS,
    MAX_ROW_DEATHS,
    MAX_STARTS,
    _Watch,
)
from ray_jobs.synthesis.worker import _Pulse

CHUNK = "descriptions/train/part-00000/chunk-00000.parquet"


def test_a_chunk_that_is_begun_again_was_lost_once():
    watch = _Watch()
    watch.begin(CHUNK, "first")
    assert watch.incidents() == []
    watch.begin(CHUNK, "second")
    (incident,) = watch.incidents()
    assert (incident["kind"], incident["chunk"]) == ("engine_lost", CHUNK)


def test_an_engine_that_ends_itself_says_why():
    watch = _Watch()
    watch.begin(CHUNK, "first")
    watch.last_words("first", "engine_hung", "no answer in 300 s")
    watch.begin(CHUNK, "second")
    assert watch.incidents()[0]["kind"] == "engine_hung"
    assert watch.incidents()[0]["detail"] == "no answer in 300 s"


def test_a_finished_chunk_leaves_nothing_behind():
    watch = _Watch()
    watch.start()
    watch.begin(CHUNK, "first")
    watch.end(CHUNK)
    assert watch.start() == 1
    assert not watch.begin(CHUNK, "second").careful
    assert watch.incidents() == []


def test_the_row_that_kills_engines_is_found_and_given_up():
    watch = _Watch()
    for death in range(CAREFUL_BEGIN - 1):
        assert not watch.begin(CHUNK, f"careless {death}").careful
    for death in range(MAX_ROW_DEATHS):
        begun = watch.begin(CHUNK, f"careful {death}")
        assert begun.careful
        assert not begun.poison
        watch.row(CHUNK, "harmless")
        watch.row(CHUNK, None)
        watch.row(CHUNK, "deadly")
    assert watch.begin(CHUNK, "last").poison == {"deadly"}


def starts_of(deadly: dict[str, str], watch: _Watch) -> int:
    """How often one engine is started until no chunk is lost, at most; by chunks' deadly rows."""
    for started in range(100):
        if watch.start() > MAX_STARTS:
            return started
        begun = {chunk: watch.begin(chunk, f"engine {started}") for chunk in deadly}
        left = [chunk for chunk, row in deadly.items() if row not in begun[chunk].poison]
        if not left:
            return 100
        careful = [chunk for chunk in left if begun[chunk].careful]
        if careful:  # another one at each start, as the order of the event loop may have it
            watch.row(careful[started % len(careful)], deadly[careful[started % len(careful)]])
    raise AssertionError("it never ends")


def test_one_engine_outlives_a_deadly_row_in_each_chunk_it_has_in_work():
    assert starts_of({f"chunk {at}": f"row {at}" for at in range(4)}, _Watch()) == 100


def test_an_engine_that_dies_of_every_row_is_given_up():
    watch = _Watch()
    for started in range(100):
        if watch.start() > MAX_STARTS:
            break
        watch.begin(CHUNK, f"engine {started}")
        watch.row(CHUNK, f"row {started // MAX_ROW_DEATHS}")
    assert started == MAX_STARTS + MAX_FINDING_DEATHS


def test_silence_while_somebody_waits_is_a_hang():
    hung = threading.Event()
    pulse = _Pulse(0.2, lambda silent: hung.set())
    with pulse:
        assert hung.wait(30)


def test_silence_while_nobody_waits_is_none():
    hung = threading.Event()
    pulse = _Pulse(0.05, lambda silent: hung.set())
    with pulse:
        pass
    assert not hung.wait(0.5)
