"""Where encoders compute."""

import pytest
import torch

from ray_jobs.encoding import ImageEncoder
from rwkv_clip.model import create_model, named_config


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_was_given_no_gpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a node with GPUs, which Ray does not hide from tasks that hold none.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ImageEncoder(create_model(named_config("RWKV-CLIP-Tiny"))).device.type == "cpu"
