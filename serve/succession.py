"""Which model is served, and how the next one takes its place.

Every replica of both towers holds the models that it is told to, and says which it has. The next
model is served when all of them have it, and the one before stays in memory for as long as a
request may take: so a request goes through one model however its parts travel, and none waits for a
model to be loaded. A model that one replica cannot load, or whose vectors are wrong, is refused by
all.

`Succession` is the rule, without Ray; `Director` is the deployment that follows it.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from serve.config import ServeFile
from serve.messages import REPORT_SECONDS, TOWERS, ModelPlace, Orders, Report, Standing, Tower
from serve.registry import ModelError, find_model

logger = logging.getLogger(__name__)

_GONE_SECONDS = 15.0  # without a report
_AGAIN_SECONDS = 60.0  # until a refused model is tried again: what it came from may be back


@dataclass
class Succession:
    """The rule.

    Attributes:
        current: the model that is served.
        keep_seconds: that a model stays in memory after its time.
    """

    current: ModelPlace
    keep_seconds: float
    _coming: ModelPlace | None = None
    _adopted: bool = False
    _past: dict[ModelPlace, float] = field(default_factory=dict)  # until when it is kept
    _refused: dict[ModelPlace, tuple[str, float]] = field(default_factory=dict)
    _heard: dict[tuple[Tower, str], tuple[Report, float]] = field(default_factory=dict)

    @property
    def adopted(self) -> bool:
        """Whether a replica was told what to serve; until then the next is served at once."""
        return self._adopted

    def want(self, place: ModelPlace, now: float) -> None:
        """Begin to serve a model, unless it was refused just now."""
        if not self._adopted:
            self.current = place
        elif place == self.current:
            self._coming = None
            self._refused.clear()
        elif now >= self._refused.get(place, ("", 0.0))[1] and place != self._coming:
            logger.info("version %s of %s is being loaded", place.version, place.name)
            self._coming = place

    def report(self, report: Report, now: float) -> Orders:
        """Hear a replica, and tell it what to do."""
        if report.serving is not None and not self._adopted:
            # This is a new director of a server that runs: it begins with what is served.
            self.current = report.serving
        self._adopted = True
        self._heard[report.tower, report.replica] = (report, now)
        for key in [key for key, (_, at) in self._heard.items() if now - at > _GONE_SECONDS]:
            del self._heard[key]
        for place, reason in report.refused:
            if place == self._coming:
                logger.error("version %s is refused: %s", place.version, reason)
                self._refused = {place: (reason, now + _AGAIN_SECONDS)}
                self._coming = None
        self._advance(now)
        self._past = {place: until for place, until in self._past.items() if until > now}
        coming = (self._coming,) if self._coming else ()
        hold = dict.fromkeys((self.current, *coming, *self._past))
        return Orders(self.current, tuple(hold))

    def standing(self, trouble: str | None = None) -> Standing:
        """How things stand."""
        refused = tuple((place.version, why) for place, (why, _) in self._refused.items())
        return Standing(self.current, self._coming, refused, trouble)

    def _advance(self, now: float) -> None:
        """Serve the next model if every replica has it."""
        if self._coming is None:
            return
        heard = [report for report, _ in self._heard.values()]
        if {report.tower for report in heard} != set(TOWERS):
            return
        if all(self._coming in report.holds for report in heard):
            logger.info("version %s is served from now on", self._coming.version)
            self._past[self.current] = now + self.keep_seconds
            self.current, self._coming = self._coming, None
            self._refused.clear()


class Director:
    """Watches the registry, and tells the towers what to serve. One replica.

    Its user configuration `{"model": ...}` stands in for the file's `serve.model`.

    Args:
        config: of the endpoint.
        place: of the model as it was when the application was built.
    """

    async def __init__(self, config: ServeFile, place: ModelPlace) -> None:  # type: ignore[misc]
        self.config = self.asked = config
        self.trouble: str | None = None
        self.misread: str | None = None  # of a user configuration
        self.ending = False
        self.ingresses: dict[str, tuple[int | None, float]] = {}  # what they said, and when
        self.threads = ThreadPoolExecutor(1, "registry")
        self.changed = asyncio.Event()
        self.succession = Succession(place, config.serve.request_seconds + 2 * REPORT_SECONDS)
        await self._look()  # a replica that begins anew begins with what is meant now
        self.watcher = asyncio.create_task(self._watch())

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take another model, or with none the file's own; raises nothing: what serves goes on.

        Serve calls it first before anybody can ask for orders.
        """
        user_config = user_config or {}
        told = dict(user_config)
        model = told.pop("model", None)
        if told or not isinstance(model, str | None):
            self.misread = f"user_config: takes {{model: NAME}} alone, not {sorted(user_config)}"
            logger.error(self.misread)
            return
        self.misread = None
        changes = {"model": model or self.config.serve.model}
        asked = self.config.model_copy(
            update={"serve": self.config.serve.model_copy(update=changes)}
        )
        if asked == self.asked:
            return
        self.asked = asked
        if self.succession.adopted:
            self.changed.set()
        else:  # a server that begins is not to load the champion first
            await self._look()

    async def orders(self, report: Report) -> Orders:
        """What a replica of a tower is to do."""
        return self.succession.report(report, time.monotonic())

    async def standing(self, ingress: str | None = None, ongoing: int | None = None) -> Standing:
        """How things stand.

        Args:
            ingress: the replica that asks.
            ongoing: requests that it still answers, if it has heard that the server ends.
        """
        if ingress is not None:
            self.ingresses[ingress] = (ongoing, time.monotonic())
        standing = self.succession.standing(self.misread or self.trouble)
        return replace(standing, ending=self.ending)

    async def end(self) -> bool:
        """Let the ingresses take no more requests; whether those that came are answered."""
        self.ending = True
        now = time.monotonic()
        heard = [ongoing for ongoing, at in self.ingresses.values() if now - at < _GONE_SECONDS]
        return all(ongoing == 0 for ongoing in heard)

    async def check_health(self) -> None:
        """Fail where the registry is no longer watched; Serve then replaces the replica."""
        if self.watcher.done():
            raise RuntimeError("the registry is no longer watched")

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), self.config.serve.watch_seconds)
            self.changed.clear()
            await self._look()

    async def _look(self) -> None:
        """Want the model that is meant now."""
        if (found := await self._find()) is not None:
            self.succession.want(found, time.monotonic())

    async def _find(self) -> ModelPlace | None:
        """The model that is meant now; None, and the reason is kept, if that cannot be told."""
        try:
            run = asyncio.get_running_loop().run_in_executor
            found = await run(self.threads, find_model, self.asked)
        except ModelError as error:
            if self.trouble != str(error):
                logger.error("the model stays as it is: %s", error)
            self.trouble = str(error)
            return None
        except Exception as error:  # a registry's client raises whatever its server leads it to
            logger.exception("the model stays as it is")
            self.trouble = f"the registry cannot be asked ({type(error).__name__})"
            return None
        self.trouble = None
        return found
