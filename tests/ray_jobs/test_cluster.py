"""What a connection to Ray does to this process."""

import logging

from ray_jobs.cluster import RayConfig, quieten


def test_rays_own_words_are_kept_from_the_terminal_and_nobody_elses():
    own, shared = logging.StreamHandler(), logging.StreamHandler()
    module = logging.getLogger("ray.llm.a_module_with_a_handler")
    module.addHandler(own)
    module.addHandler(shared)
    logging.root.addHandler(shared)
    try:
        quieten()
        assert own.level == logging.ERROR
        assert shared.level == logging.NOTSET
    finally:
        logging.root.removeHandler(shared)
        module.handlers.clear()


def test_a_running_cluster_is_named_by_the_configuration_or_by_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert RayConfig().running() is None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert RayConfig().running() == "127.0.0.1:6379"
    assert RayConfig(address="auto").running() == "auto"
