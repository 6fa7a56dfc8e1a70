"""How streams are cut into tasks."""

from ray_jobs.execution import work_items


def test_each_item_of_work_is_a_block_of_its_own(ray_cluster):
    count = 250  # Ray Data makes 200 blocks at most of its own accord
    blocks = work_items([{"at": at} for at in range(count)]).iter_internal_ref_bundles()
    assert sum(len(bundle.blocks) for bundle in blocks) == count
