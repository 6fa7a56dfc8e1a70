"""Marks runs as killed when the process that held them is gone without a word.

    python -P ray_jobs/tracking/watcher.py TRACKING_URI

Reads `open RUN` and `close RUN` lines. A pipe ends whatever way its writer died, kill -9 included,
so what is open at its end was killed. MLflow, which takes seconds and hundreds of megabytes, is
imported only then.
"""

import sys
from contextlib import suppress


def main() -> int:
    """Follow the lines to their end."""
    uri, held = sys.argv[1], dict[str, None]()
    for line in sys.stdin:
        verb, _, run = line.strip().partition(" ")
        if verb == "open":
            held[run] = None
        else:
            held.pop(run, None)
    if held:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(tracking_uri=uri)
        for run in reversed(held):
            with suppress(MlflowException):  # deleted meanwhile; the others are to be ended too
                client.set_terminated(run, "KILLED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
