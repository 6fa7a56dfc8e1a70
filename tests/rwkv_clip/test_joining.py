"""Where Ray cannot be joined or started, what to do about it."""

from importlib.metadata import version

import pytest

from rwkv_clip.cli import CommandError
from rwkv_clip.joining import joining


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("no token"), "RAY_ADDRESS: auto cannot be joined: no token.*AUTH_TOKEN"),
        (RuntimeError("Version mismatch"), f"Version mismatch.*of Ray {version('ray')}"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_with_what_to_do(error, told):
    with pytest.raises(CommandError, match=told), joining("auto"):
        raise error


def test_a_cluster_that_does_not_start_in_time_is_told_with_what_to_do():
    with pytest.raises(CommandError, match="stop what keeps the cores busy"), joining(None):
        raise Exception("The current node timed out during startup.")


@pytest.mark.parametrize("error", [ConnectionError("other"), RuntimeError("other")])
def test_other_errors_of_a_start_stay_as_they_are(error):
    with pytest.raises(type(error), match="other"), joining(None):
        raise error
