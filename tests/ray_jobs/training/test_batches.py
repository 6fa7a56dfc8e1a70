"""Batches as a training worker gets them from Ray Data."""

import numpy as np
import pytest

from ray_jobs.training.batches import BatchMaker, Images, PairFiles, choose_text, stream
from ray_jobs.training.plan import DataPlan
from rwkv_clip.model.config import named_config


def test_a_run_of_many_lots_of_windows_has_the_batches_of_one(emoji_storage):
    files = PairFiles.of(emoji_storage)
    plan = DataPlan(files.flat_row_groups, 32, 4, 4, 0)
    images = Images.of(named_config("RWKV-CLIP-Tiny"))
    maker = BatchMaker(files, plan, plan.lanes_of(0, 2), images, 16)
    last = plan.steps_per_epoch + 5
    assert plan.steps_per_epoch % plan.shuffle_steps  # an epoch's last window is cut

    def ids(**windows: int) -> list[list[str]]:
        arrived = stream(maker, 1, last, 0.2, **windows)
        return [batch["id"].tolist() for batch in arrived]

    at_once = ids()
    assert [len(batch) for batch in at_once] == [16] * (last - 1)
    assert at_once == ids(windows=2)  # three lots, and the cut window inside of one


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ({"web_text": "my cat", "caption": "a cat", "tags": ["cat"]}, "my cat"),
        ({"web_text": None, "caption": "a cat", "tags": ["cat"]}, ""),
        ({"web_text": "", "caption": None, "tags": ["cat", "grass"]}, "cat, grass"),
        ({"web_text": None, "caption": None, "tags": None}, ""),
    ],
)
def test_a_training_on_web_texts_alone_sees_nothing_else(pair, expected):
    weights = {"web_text": 1.0, "caption": 0.0, "description": 0.0}
    assert choose_text(pair, weights, np.random.default_rng(0)) == expected
