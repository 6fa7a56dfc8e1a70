"""`/v1/search`: the pairs whose images are nearest to a text or an image."""

from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import Field, PositiveInt, SkipValidation

from serve.errors import ApiError
from serve.index import Hit, IndexFiles, told
from serve.inputs import Item, Reader, Shape, Text
from serve.succession import Tower
from serve.towers import Handle, Served, answer_headers, answered_by, call, check_model


class SearchRequest(Shape):
    """What `/v1/search` takes."""

    input: SkipValidation[Item] = Field(description="a text, an image as data:image/…, or a part")
    limit: PositiveInt = Field(10, description="results that are wanted")
    with_images: bool = Field(False, description="whether results have a small picture")
    model: str | None = Field(None, description="the served model's name, or nothing")


class Searcher:
    """An index behind the towers.

    Args:
        files: that are searched; None if there are none.
        index: the deployment that does.
    """

    def __init__(self, files: IndexFiles | None, index: Handle | None) -> None:
        self.files, self.index = files, index

    async def search(self, asked: SearchRequest, served: Served, reader: Reader) -> Response:
        """The nearest pairs, the nearest first; raises ApiError."""
        if self.files is None or self.index is None:
            raise ApiError(
                404,
                "no_index",
                "there is nothing to search in; run `rwkv-clip embed` with this server's "
                "configuration and start it again",
            )
        most = self.files.settings.results
        if asked.limit > most:
            raise ApiError(
                400, "too_many_results", f"limit: is {asked.limit}, more than {most}", "limit"
            )
        try:
            item = await reader.item(asked.input)
        except ApiError as error:
            raise ApiError(error.status, error.code, f"input: {error.message}", "input") from None
        card = served.card
        check_model(asked.model, card)
        if card.digest != self.files.model:
            raise ApiError(
                503,
                "index_of_another_model",
                "the vectors were made by another model than the one that is served; run "
                "`rwkv-clip embed` again and start the server again",
            )
        tower: Tower = "text" if isinstance(item, Text) else "image"
        payload = item.text if isinstance(item, Text) else item.data
        query = await served.encode(tower, [payload])
        if query.failures:
            raise ApiError(400, "broken_image", f"input: {query.failures[0]}", "input")
        method = "search_with_pictures" if asked.with_images else "search"
        hits: list[Hit] = await call(self.index, "index", method, query.vectors[0], asked.limit)
        data: list[dict[str, Any]] = [told(hit, at) for at, hit in enumerate(hits)]
        return JSONResponse(
            {"object": "list", "data": data, **answered_by(card, query.tokens)},
            headers=answer_headers(card, [query]),
        )
