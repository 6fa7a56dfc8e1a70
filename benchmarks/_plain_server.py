"""The baseline of serving.py: uvicorn around a model, one request at a time, no batches.

python _plain_server.py FOLDER PORT THREADS
"""

import base64
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

import rwkv_clip
from rwkv_clip.model import load_checkpoint


def application(folder: str) -> FastAPI:
    model = load_checkpoint(folder).eval()
    transform = rwkv_clip.image_transform(model.config)
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            data = [
                base64.b64encode(encode(item).numpy().tobytes()).decode() for item in body["input"]
            ]
        return {"data": [{"index": at, "embedding": one} for at, one in enumerate(data)]}

    def encode(item: str) -> torch.Tensor:
        if item.startswith("data:"):
            image = base64.b64decode(item.partition(",")[2])
            return model.encode_image(transform(image)[None])[0]
        return model.encode_text(rwkv_clip.tokenize([item], model.config.context_length))[0]

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(
        application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="error"
    )
