"""Settings small enough for tests, which several of them start from."""

from typing import Any

PAIRS = 200
TRAIN: dict[str, Any] = {
    "model": {
        "name": "RWKV-CLIP-Tiny",
        "embed_dim": 32,
        "image": {
            "depth": 2,
            "heads": 2,
            "hidden_dim": 64,
            "patch_size": 16,
            "image_size": 32,
            "drop_path": 0.3,
        },
        "text": {"depth": 1, "heads": 2, "hidden_dim": 64, "context_length": 12},
    },
    "batch": 32,
    "epochs": 1.5,
    "threads": 1,
    "cpus_per_worker": 0.4,
    # Of two CPUs half a one for each task: more of them would be more processes to start.
    "data": {"lanes": 4, "shuffle_steps": 2, "cpus_per_task": 0.5},
    "log_steps": 1,
    "checkpoint_steps": 4,
}
