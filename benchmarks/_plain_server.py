"""The baselines of serving.py: one request at a time, no batches, no checks.

    python _plain_server.py FOLDER PORT THREADS

is uvicorn around a model. `on_serve` is the least that Ray Serve can make of the same: an ingress,
and a deployment that holds the model.
"""

import asyncio
import base64
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

import rwkv_clip
from rwkv_clip.model import load_checkpoint


class Model:
    """A model that is called in one thread.

    OpenMP gives each thread that calls a model helpers of its own. With more of them than cores it
    lets them sleep between any two steps, and a call takes a third longer.
    """

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(1)
        self.model = load_checkpoint(folder).eval()
        self.transform = rwkv_clip.image_transform(self.model.config)
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    async def encode(self, items: Sequence[str]) -> list[str]:
        """Embeddings of texts and of data URIs, in base64."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._encode, items)

    @torch.inference_mode()
    def _encode(self, items: Sequence[str]) -> list[str]:
        return [base64.b64encode(self._one(item).numpy().tobytes()).decode() for item in items]

    def _one(self, item: str) -> torch.Tensor:
        if item.startswith("data:"):
            image = base64.b64decode(item.partition(",")[2])
            return self.model.encode_image(self.transform(image)[None])[0]
        tokens = rwkv_clip.tokenize([item], self.model.config.context_length)
        return self.model.encode_text(tokens)[0]


def answer(embeddings: Sequence[str]) -> dict[str, Any]:
    """A body."""
    return {"data": [{"index": at, "embedding": one} for at, one in enumerate(embeddings)]}


def application(folder: str, threads: int) -> FastAPI:
    """The application of uvicorn."""
    model = Model(folder, threads)
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    async def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        return answer(await model.encode(body["input"]))

    return app


def on_serve(folder: str, threads: int) -> serve.Application:
    """The application of Ray Serve."""
    app = FastAPI()

    @serve.ingress(app)
    class Ingress:
        def __init__(self, tower: DeploymentHandle[Any]) -> None:
            self.tower = tower

        @app.post("/v1/embeddings")
        async def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
            return answer(await self.tower.encode.remote(body["input"]))

    deployment = serve.deployment(ray_actor_options={"num_cpus": 0.1})
    return deployment(Ingress).bind(deployment(Model).bind(folder, threads))


if __name__ == "__main__":
    app = application(sys.argv[1], int(sys.argv[3]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
