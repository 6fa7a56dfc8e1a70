"""`/v1/search`: the pairs whose images are nearest to a text or an image."""

import time
from typing import Annotated, Any

from fastapi.responses import JSONResponse, Response
from pydantic import Field, PositiveInt

from serve.config import SearchConfig
from serve.errors import ApiError
from serve.index import Hit, Lacking, told
from serve.inputs import Item, Reader, Shape, Text, Unread
from serve.messages import Tower
from serve.towers import Handle, Served, answer_headers, answered_by, call, check_model

_RESULTS = 24  # that fill the page


class SearchRequest(Shape):
    """What `/v1/search` takes."""

    input: Annotated[Item, Unread] = Field(
        description="a text, an image as data:image/…, or a part"
    )
    limit: PositiveInt | None = Field(
        None, description=f"results that are wanted; {_RESULTS} if absent, where so many are given"
    )
    with_images: bool | None = Field(False, description="whether results have a small picture")
    model: str | None = Field(None, description="the served model's name, or nothing")


class Searcher:
    """An index behind the towers.

    Args:
        settings: of the search; None if there is to be none.
        index: the deployment that searches.
    """

    def __init__(self, settings: SearchConfig | None, index: Handle | None) -> None:
        self.settings, self.index = settings, index

    async def search(self, asked: SearchRequest, served: Served, reader: Reader) -> Response:
        """The nearest pairs, the nearest first; raises ApiError."""
        if self.settings is None or self.index is None:
            raise ApiError(
                404, "no_index", "this server searches nothing; set serve.search and storage"
            )
        most = self.settings.results
        limit = min(_RESULTS, most) if asked.limit is None else asked.limit
        if limit > most:
            raise ApiError(400, "too_many_results", f"limit: is more than {most}", "limit")
        try:
            item = await reader.item(asked.input)
        except ApiError as error:
            raise ApiError(error.status, error.code, f"input: {error.message}", "input") from None
        card = served.card
        check_model(asked.model, card)
        tower: Tower = "text" if isinstance(item, Text) else "image"
        payload = item.text if isinstance(item, Text) else item.data
        query = await served.encode(tower, [payload])
        if query.failures:
            raise ApiError(400, "broken_image", f"input: {query.failures[0]}", "input")
        began = time.monotonic()
        hits: list[Hit] | Lacking = await call(
            self.index, "index", "search",
            query.vectors[0], limit, card.digest, bool(asked.with_images),
        )  # fmt: skip
        seconds = time.monotonic() - began
        if isinstance(hits, Lacking):
            raise _lacking(hits)
        data: list[dict[str, Any]] = [told(hit, at) for at, hit in enumerate(hits)]
        headers = answer_headers(card, [query])
        headers["Server-Timing"] += f", search;dur={1000 * seconds:.1f}"
        return JSONResponse(
            {"object": "list", "data": data, **answered_by(card, query.tokens)}, headers=headers
        )


def _lacking(lacking: Lacking) -> ApiError:
    """Why there is no answer."""
    if lacking.trouble is not None:
        return ApiError(
            503, "index_broken", "the vectors to be searched cannot be loaded; see the server's log"
        )
    if lacking.others:
        return ApiError(
            503,
            "index_of_another_model",
            "the vectors were made by another model than the one that is served; run `rwkv-clip "
            "embed --set embed.replace=true --set embed.model=MODEL` with what serve.model names, "
            "such as models:/NAME@champion, and they are taken when they are complete",
        )
    return ApiError(
        404,
        "no_index",
        "there is nothing to search in yet; run `rwkv-clip embed` with this server's "
        "configuration, and its vectors are taken when they are complete",
    )
