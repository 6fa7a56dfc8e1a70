"""`/v1/search`: the nearest pairs of an embedded data set, with their pictures."""

import asyncio
import base64
import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_jobs.embed import EmbedConfig, embed
from ray_jobs.storage import Storage
from ray_jobs.tracking.source import ModelSource, stored_model
from ray_jobs.training.batches import PairFiles
from rwkv_clip import image_transform, tokenize
from rwkv_clip.model import create_model, save_checkpoint
from serve.config import FaissConfig, SearchConfig, ServeFile
from serve.index import (
    Cells,
    Collection,
    Exact,
    Hit,
    Index,
    Lacking,
    SearchError,
    find_index,
    method_of,
)
from tests.serve.small import data_uri, small_config


@pytest.fixture(scope="module")
def pairs(searched: Storage) -> list[dict[str, object]]:
    return PairFiles.of(searched, "test").take(np.arange(80))


def test_a_text_finds_the_images_that_are_nearest(client, model, pairs):
    with torch.inference_mode():
        transform = image_transform(model.config)
        images = model.encode_image(torch.stack([transform(pair["image"]) for pair in pairs]))
        query = model.encode_text(tokenize(["a red heart"], model.config.context_length))
    scores = (images @ query[0]).numpy()
    answer = client.post("/v1/search", json={"input": "a red heart", "limit": 30})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    found = [one["score"] for one in data]
    np.testing.assert_allclose(found, np.sort(scores)[::-1][:30], atol=1e-5)
    by_id = {pair["id"]: (at, pair["caption"]) for at, pair in enumerate(pairs)}
    for one in data:
        at, caption = by_id[one["id"]]
        assert one["score"] == pytest.approx(scores[at], abs=1e-5)
        assert one["text"] == caption
    assert "image" not in data[0]


def test_an_image_finds_itself_and_its_picture(client, pairs):
    for at in (0, 39, 40, 79):
        body = {"input": data_uri(pairs[at]["image"]), "limit": 3, "with_images": True}
        data = client.post("/v1/search", json=body).json()["data"]
        assert data[0]["id"] == pairs[at]["id"]
        assert data[0]["score"] == pytest.approx(1, abs=1e-5)
        content = base64.b64decode(data[0]["image"].removeprefix("data:image/jpeg;base64,"))
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)
        drawn = Image.open(io.BytesIO(pairs[at]["image"])).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
        expected = np.asarray(white.convert("RGB").resize(shown.shape[1::-1]), float)
        assert np.abs(shown - expected).mean() < 12


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": "x", "limit": 0}, 400, "limit"),
        ({"input": "x", "limit": 31}, 400, "limit"),
        ({"input": 7}, 400, "input"),
    ],
)
def test_a_bad_request_is_told_by_its_key(client, body, status, param):
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_without_vectors_there_is_no_index(tmp_path, searched):
    assert find_index(ServeFile.model_validate({"storage": {"uri": str(tmp_path)}})) is None
    off = {"storage": {"uri": searched.uri}, "serve": {"search": None}}
    assert find_index(ServeFile.model_validate(off)) is None


def test_vectors_that_are_written_anew_are_taken_without_a_gap(searched, checkpoint, tmp_path):
    """The old ones are there until the new model is asked for."""
    storage = Storage.at(tmp_path / "run")
    shutil.copytree(f"{searched.uri}/pairs", tmp_path / "run" / "pairs")
    shutil.copytree(f"{searched.uri}/vectors", tmp_path / "vectors")  # of the first model
    torch.manual_seed(3)
    save_checkpoint(create_model(small_config()), tmp_path / "second")
    first, second = (
        stored_model(Storage.at(folder), "", "small")
        for folder in (checkpoint, tmp_path / "second")
    )
    config = ServeFile.model_validate(
        {"storage": {"uri": storage.uri}, "serve": {"watch_seconds": 0.05, "request_seconds": 1.0}}
    )
    settings = EmbedConfig(batch=32, cpus_per_worker=0.2, replace=True)
    query = np.ones(small_config().embed_dim, np.float32)

    async def work() -> None:
        index = Index.__new__(Index)
        await index.__init__(config)

        async def found(model: ModelSource) -> list[Hit] | Lacking:
            return await index.search(query, 3, model.digest, False)

        async def find(model: ModelSource) -> list[Hit]:
            async with asyncio.timeout(60):
                while isinstance(hits := await found(model), Lacking):
                    await asyncio.sleep(0.01)
            return hits

        assert await found(first) == Lacking(others=False, trouble=None)
        (tmp_path / "vectors").rename(tmp_path / "run" / "vectors")
        hits = await find(first)
        assert await found(second) == Lacking(others=True, trouble=None)

        await asyncio.to_thread(embed, settings, storage, second)
        async with asyncio.timeout(60):
            while index.newest.files.model != second.digest:
                assert await found(first) == hits
                await asyncio.sleep(0.01)
        assert await found(first) == hits, "nobody asked for the second model yet"
        others = await find(second)
        assert [one.score for one in others] != [one.score for one in hits]
        assert await found(first) == hits, "a request may have begun before"
        async with asyncio.timeout(60):
            while await found(first) != Lacking(others=True, trouble=None):
                await asyncio.sleep(0.01)

        storage.write_bytes("vectors/test/manifest.json", b"{")
        async with asyncio.timeout(60):
            while index.trouble is None:
                await asyncio.sleep(0.01)
        assert "run `rwkv-clip embed` again" in index.trouble
        assert await found(second) == others
        index.watcher.cancel()

    asyncio.run(work())


def test_other_pairs_than_those_that_were_embedded_are_not_shown(searched, tmp_path):
    """As it is between an `ingest` of other pairs and the next `embed`."""
    shutil.copytree(searched.uri, tmp_path, dirs_exist_ok=True)
    config = ServeFile.model_validate({"storage": {"uri": str(tmp_path)}})
    files = find_index(config)
    assert files is not None
    collection = Collection(files)
    query = np.ones(small_config().embed_dim, np.float32)
    before = collection.search(query, 80, pictures=True)
    assert all(hit.picture for hit in before)

    first, second = (tmp_path / "pairs" / "test" / f"{part}.parquet" for part in files.parts)
    table = pq.read_table(first)
    kept = {*table["id"].to_pylist()[::2]}
    others = [one if one in kept else f"another {one}" for one in table["id"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", [others]), first)
    in_second = {*pq.read_table(second)["id"].to_pylist()}
    for hit in collection.search(query, 80, pictures=True):
        assert (hit.picture is not None) == (hit.id in kept | in_second)
    pq.write_table(table.slice(0, 1), first)
    assert len(collection.search(query, 80, pictures=True)) == 80
    with pytest.raises(SearchError, match="run `rwkv-clip embed` again"):
        Collection(files)


def test_pairs_are_read_from_the_files_that_their_manifest_names(searched, tmp_path):
    shutil.copytree(searched.uri, tmp_path, dirs_exist_ok=True)
    storage = Storage.at(tmp_path)
    record = storage.read_json("pairs/test/manifest.json")
    for part in record["parts"]:  # as those are called that duplicates were taken out of
        held, part["path"] = part["path"], f"pairs/test/{part['name']}-0123456789ab.parquet"
        (tmp_path / held).rename(tmp_path / part["path"])
    storage.write_json("pairs/test/manifest.json", record)
    files = find_index(ServeFile.model_validate({"storage": {"uri": str(tmp_path)}}))
    assert files is not None
    query = np.ones(small_config().embed_dim, np.float32)
    hits = Collection(files).search(query, 80, pictures=True)
    assert len(hits) == 80
    assert all(hit.picture and hit.text for hit in hits)


def test_cells_find_nearly_what_a_product_with_all_finds():
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((40, 32))
    vectors = centres.repeat(100, 0) + 0.5 * generator.standard_normal((4000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    config = SearchConfig(exact_rows=1000, faiss=FaissConfig(cells=64, probes=8))
    exact, cells = Exact(vectors), method_of(vectors, config)
    assert isinstance(cells, Cells)
    found = 0
    for query in vectors[::100]:
        places, scores = exact.nearest(query, 10)
        near, rounded = cells.nearest(query, 10)
        found += len({*places} & {*near})
        np.testing.assert_allclose(rounded[0], scores[0], atol=1e-3)
    assert found >= 0.95 * 400


def test_the_method_is_chosen_by_the_number_of_vectors():
    vectors = np.eye(20, dtype=np.float32)
    for method, kind in (("auto", Exact), ("exact", Exact), ("faiss", Cells)):
        chosen = method_of(vectors, SearchConfig(method=method))
        assert isinstance(chosen, kind)
        places, scores = chosen.nearest(vectors[3], 50)
        assert (places[0], len(places)) == (3, 20)
        assert scores[0] == pytest.approx(1, abs=1e-3)
