"""Another version takes a model's place while it is asked; one that is no good does not."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import load_file, save_file

from rwkv_clip import image_transform, tokenize
from rwkv_clip.model import RWKVCLIP, create_model, save_checkpoint
from serve.compute import Compute
from serve.config import ServeFile
from serve.encoders import Encoder
from serve.messages import Orders, Report
from serve.models import check_model, load_model
from serve.registry import ModelError, find_model
from serve.succession import Director
from serve.towers import Handle
from tests.ray_jobs.killing import wait_until
from tests.serve.small import Registry, data_uri, director_alone, picture, small_config

TEXT, IMAGE = "a red heart", picture(0)


def vectors(model: RWKVCLIP) -> np.ndarray:
    with torch.inference_mode():
        text = model.encode_text(tokenize([TEXT], model.config.context_length))
        image = model.encode_image(image_transform(model.config)(IMAGE)[None])
    return torch.cat([text, image]).numpy()


def new_model(folder: Path, seed: int = 1) -> RWKVCLIP:
    torch.manual_seed(seed)
    model = create_model(small_config()).eval()
    save_checkpoint(model, folder)
    return model


@pytest.fixture
def ready(client: httpx.Client) -> Callable[[Callable[[dict], bool]], dict]:
    """Wait until /readyz says what is waited for."""

    def wait(condition: Callable[[dict], bool]) -> dict:
        def told() -> dict | None:
            answer = client.get("/readyz")
            found = answer.json() if answer.status_code == 200 else None
            return found if found and condition(found) else None

        return wait_until(told, "what /readyz is to say")

    return wait


@pytest.fixture
def first_again(endpoint: str, registry: Registry, ready) -> Iterator[None]:
    """Afterwards the first version is served, as other tests expect."""
    yield
    registry.champion("1")
    ready(lambda told: told["model_version"] == "1" and "refused" not in told)


def test_a_swap_under_load_fails_no_request(
    endpoint, registry, model, ready, first_again, tmp_path
):
    version = registry.add(tmp_path)
    expected = {"1": vectors(model), version: vectors(new_model(tmp_path))}
    stop = threading.Event()
    seen: dict[str, int] = {"1": 0, version: 0}
    body = {"input": [TEXT, data_uri(IMAGE)]}

    def ask() -> None:
        with httpx.Client(base_url=endpoint, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/embeddings", json=body)
                assert answer.status_code == 200, answer.text
                assert client.get("/v1/models").status_code == 200
                told = answer.json()
                found = np.array([one["embedding"] for one in told["data"]])
                np.testing.assert_allclose(found, expected[told["model_version"]], atol=1e-5)
                seen[told["model_version"]] += 1

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(ask) for _ in range(4)]
        try:
            registry.champion(version)
            ready(lambda told: told["model_version"] == version)
            before = seen[version]
            wait_until(
                lambda: seen[version] >= before + 20 or any(one.done() for one in running),
                "answers of the second version",
            )
        finally:
            stop.set()
        for one in running:
            one.result()
    assert min(seen.values()) > 0, seen


def not_finite(folder: Path) -> None:
    new_model(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["text_model.ln_out.weight"][0] = float("nan")
    save_file(weights, file)


def no_scale(folder: Path) -> None:
    new_model(folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "logit_scale": torch.tensor(float("nan"))}, file)


def another_width(folder: Path) -> None:
    torch.manual_seed(0)
    config = small_config()
    wider = {
        tower: replace(getattr(config, tower), embed_dim=2 * config.embed_dim)
        for tower in ("image", "text")
    }
    save_checkpoint(create_model(replace(config, **wider)), folder)


def no_weights(folder: Path) -> None:
    new_model(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors at all")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (not_finite, "not finite"),
        (no_scale, "logit_scale"),
        (another_width, "numbers"),
        (no_weights, "cannot be loaded"),
    ],
)
def test_a_model_that_is_no_good_is_refused(
    client, registry, ready, model, first_again, tmp_path, spoil, reason
):
    spoil(tmp_path)
    version = registry.add(tmp_path)
    registry.champion(version)
    (refused,) = ready(lambda told: "refused" in told)["refused"]
    assert refused["model_version"] == version
    assert reason in refused["reason"]
    answer = client.post("/v1/embeddings", json={"input": TEXT}).json()
    assert answer["model_version"] == "1"
    np.testing.assert_allclose(answer["data"][0]["embedding"], vectors(model)[0], atol=1e-5)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 100.0])
def test_a_scale_that_classifies_nothing_is_no_models(scale, tower):
    model = create_model(small_config()).eval()
    check_model(model, tower)
    with torch.no_grad():
        model.logit_scale.fill_(scale)
    with pytest.raises(ModelError, match=r"scale \(logit_scale\) is not finite"):
        check_model(model, tower)


def test_a_folder_that_changed_is_not_served_as_what_it_was(tmp_path):
    config = ServeFile.model_validate({"serve": {"model": str(tmp_path)}})
    new_model(tmp_path, seed=1)
    before = find_model(config)
    new_model(tmp_path, seed=2)
    after = find_model(config)
    with pytest.raises(ModelError, match="holds other weights now"):
        load_model(before, config.s3())

    async def work() -> None:
        """A replica that begins while the folder's new model is on its way."""
        encoder = Encoder.__new__(Encoder)
        encoder.config, encoder.compute = config, Compute("image", config.serve.image)
        encoder.loader, encoder.held = ThreadPoolExecutor(1), {}
        encoder.serving = before
        await encoder._begin(Orders(before, (before, after)))
        assert [*encoder.held] == [after]
        with pytest.raises(ModelError, match="holds other weights now"):
            await encoder._begin(Orders(before, (before,)))

    asyncio.run(work())


def test_user_config_names_another_model_in_place_of_the_files(settings, registry, tmp_path):
    new_model(tmp_path, seed=2)
    version = registry.add(tmp_path)

    async def work() -> None:
        director = Director.__new__(Director)
        await director.__init__(settings, find_model(settings))
        assert (await director.orders(Report("image", "a"))).current.version == "1"
        await director.reconfigure({"modle": "models:/small/1"})
        assert "takes {model: NAME} alone" in (await director.standing()).trouble
        await director.reconfigure({"model": f"models:/small/{version}"})
        while (await director.standing()).coming is None:
            await asyncio.sleep(0.01)
        standing = await director.standing()
        assert (standing.coming.version, standing.trouble) == (version, None)
        director.watcher.cancel()

    asyncio.run(work())


def test_a_pin_holds_from_the_start_until_it_is_taken_out_of_serves_file(
    endpoint, settings, registry, tmp_path
):
    pinned = registry.add(tmp_path)

    def deploy(**options: object) -> None:
        application = {
            "name": "pinned",
            "route_prefix": None,
            "import_path": f"{director_alone.__module__}:{director_alone.__name__}",
            "args": settings.model_dump(mode="json"),
            **options,
        }
        written = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(written, _blocking=True)

    try:
        deploy(
            deployments=[{"name": "director", "user_config": {"model": f"models:/small/{pinned}"}}]
        )
        director: Handle = serve.get_deployment_handle("director", "pinned")
        orders = director.orders.remote(Report("image", "a")).result()
        assert orders.current.version == pinned, "the champion is not loaded first"
        deploy()
        wait_until(lambda: director.standing.remote().result().coming, "another model")
        assert director.standing.remote().result().coming.version == "1"
    finally:
        serve.delete("pinned")
