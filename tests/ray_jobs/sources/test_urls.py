"""Downloads from a real server that behaves as badly as the web."""

import asyncio
import email.utils
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from ray_jobs.sources import Rejected, Source, SourceConfig, SourceError, open_source
from ray_jobs.sources import urls as module
from ray_jobs.sources.urls import Downloader, OutageError, retry_after
from rwkv_clip.addresses import is_public

Png = Callable[[int], bytes]
QUICK = {
    "allow_private": True,
    "total_seconds": 0.6,
    "retries": 1,
    "backoff_seconds": 0.01,
    "max_bytes": 100_000,
    "max_redirects": 3,
}


class Server(ThreadingHTTPServer):
    """Counts requests by path, and how many are answered at a time."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, image: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.image = image
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.busy: Counter[str] = Counter()  # by kind of trouble
        self.busiest: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.expected = 0
        self.others_asked = threading.Event()  # as many as expected

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    """A path a kind of trouble."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        kind = self.path.split("/")[1]
        with server.lock:
            server.asked[self.path] += 1
            server.agents.add(self.headers["User-Agent"])
            server.busy[kind] += 1
            server.busiest[kind] = max(server.busiest[kind], server.busy[kind])
            if server.asked.total() == server.expected:
                server.others_asked.set()
        try:
            getattr(self, f"give_{kind}", self.give_404)()
        finally:
            with server.lock:
                server.busy[kind] -= 1

    def give(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def give_404(self) -> None:
        self.give(404)

    def give_ok(self) -> None:
        self.give(200, self.server.image, Content_Type="application/octet-stream")

    def give_busy(self) -> None:
        time.sleep(0.05)
        self.give_ok()

    def give_last(self) -> None:
        self.server.others_asked.wait(20)
        self.give_ok()

    def give_to(self) -> None:
        """Redirect from /to/HOST/PATH."""
        host, path = self.path.split("/", 3)[2:]
        self.give(302, Location=f"http://{host}:{self.server.server_address[1]}/{path}")

    def give_slow(self) -> None:
        time.sleep(1.5)
        self.give_ok()

    def give_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "50")
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def give_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(self.server.image)
        self.close_connection = True

    def give_once503(self) -> None:
        if self.server.asked[self.path] == 1:
            self.give(503, Retry_After="0")
        else:
            self.give_ok()

    def give_500(self) -> None:
        self.give(500)

    def give_later(self) -> None:
        self.give(429, Retry_After="3600")

    def give_html(self) -> None:
        self.give(200, b"<html>gone</html>", Content_Type="image/png")

    def give_huge(self) -> None:
        self.give(200, self.server.image + b"\x00" * 200_000)

    def give_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"2710\r\n" + b"\xff" * 10_000 + b"\r\n")

    def give_redirect(self) -> None:
        self.give(302, Location="/ok/after-redirect")

    def give_astray(self) -> None:
        self.give(302)

    def give_loop(self) -> None:
        self.give(301, Location="/loop")

    def give_tofile(self) -> None:
        self.give(302, Location="file:///etc/passwd")

    def give_tometadata(self) -> None:
        self.give(302, Location="http://169.254.169.254/latest/meta-data/")

    def give_noai(self) -> None:
        self.give(200, self.server.image, X_Robots_Tag="noindex, noai")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(png: Png) -> Iterator[Server]:
    with Server(png(1)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _nobody_answered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Downloader, "_answering", None)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names that end in .live are this machine's; who looks for one in .dead hears nothing."""
    over = threading.Event()
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".dead"):
            over.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "nobody answers")
        found = "127.0.0.1" if str(host).endswith(".live") else host
        return real(found, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    over.set()


def source(path: Path, **options: Any) -> Source:
    config = {"kind": "urls", "path": str(path), **QUICK, **options}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


def rows_of(one: Source) -> list[Any]:
    return [row for unit in one.units() for row in one.read(unit)]


def download(tmp_path: Path, urls: list[str], **options: Any) -> list[Any]:
    path = tmp_path / "list.jsonl"
    rows = [{"url": url, "text": f"text {i}"} for i, url in enumerate(urls)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows_of(source(path, **options))


def test_images_come_in_the_order_of_the_list(tmp_path: Path, server: Server) -> None:
    paths = [f"/{'busy' if i % 3 else 'ok'}/{i}" for i in range(30)]
    rows = download(tmp_path, [server.url(path) for path in paths], concurrency=5, unit_rows=11)
    assert [row["web_text"] for row in rows] == [f"text {i}" for i in range(30)]
    assert all(row["image"] == server.image for row in rows)
    assert len({row["id"] for row in rows}) == 30
    assert server.agents == {"rwkv-clip"}


def test_made_up_ids_tell_a_url_s_texts_apart(tmp_path: Path, server: Server) -> None:
    rows = [{"url": server.url("/ok"), "text": text} for text in ("a dog", "a cat", "a dog")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    ids = [row["id"] for row in rows_of(source(tmp_path))]
    assert ids[:3] == ids[3:]
    assert ids[0] == ids[2] != ids[1]


def test_no_more_connections_to_a_host_than_allowed(tmp_path: Path, server: Server) -> None:
    urls = [server.url(f"/busy/{i}") for i in range(12)]
    rows = download(tmp_path, urls, connections_per_host=3, total_seconds=0.3)
    assert not any(isinstance(row, Rejected) for row in rows)
    assert server.busiest["busy"] == 3


def test_a_server_that_says_nothing_holds_up_no_other(tmp_path: Path, server: Server) -> None:
    server.expected = 60
    paths = ["/last", *(f"/ok/{i}" for i in range(59))]
    rows = download(tmp_path, [server.url(path) for path in paths], concurrency=2, total_seconds=10)
    assert server.others_asked.is_set()
    assert [row["web_text"] for row in rows] == [f"text {i}" for i in range(60)]


def test_while_too_much_waits_only_the_first_row_has_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_WAITING_BYTES", 10)

    async def turns_in_order() -> None:
        turns, order = module._Turns(8, 2), []

        async def ask(place: int) -> None:
            async with turns.turn(place, f"host {place}"):
                order.append(place)

        turns.held = 10
        later, next_one, first = (asyncio.create_task(ask(place)) for place in (2, 1, 0))
        await first
        assert order == [0]
        turns.held, turns.first = 0, 1
        turns.give()
        await asyncio.gather(later, next_one)
        assert order == [0, 1, 2]

    asyncio.run(turns_in_order())


def test_turns_that_nobody_waits_for_any_more_are_others() -> None:
    async def cancelled() -> list[str]:
        turns, got = module._Turns(1, 1), []

        async def ask(place: int) -> None:
            async with turns.turn(place, "host"):
                got.append(place)

        async with turns.turn(0, "host"):
            tasks = [asyncio.create_task(ask(place)) for place in (1, 2, 3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            turns.give()
        tasks[1].cancel()  # it has its turn already
        await asyncio.gather(*tasks, return_exceptions=True)
        return got

    assert asyncio.run(cancelled()) == [3]


def test_however_little_may_wait_all_rows_come(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAITING_BYTES", 1)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    paths = [f"/{('once503', 'busy', 'ok', '404', 'redirect')[i % 5]}/{i}" for i in range(40)]
    rows = download(tmp_path, [server.url(path) for path in paths], connections_per_host=2)
    assert [isinstance(row, Rejected) for row in rows] == [i % 5 == 3 for i in range(40)]


@pytest.mark.usefixtures("names")
def test_a_redirect_waits_for_its_host_as_a_url_does(tmp_path: Path, server: Server) -> None:
    port = server.server_address[1]
    urls = [f"http://h{i}.live:{port}/to/target.live/busy/{i}" for i in range(20)]
    rows = download(tmp_path, urls, connections_per_host=2)
    assert not any(isinstance(row, Rejected) for row in rows)
    assert server.busiest["busy"] == 2


@pytest.mark.usefixtures("names")
def test_hosts_that_lead_to_each_other_do_not_wait_for_each_other(
    tmp_path: Path, server: Server
) -> None:
    port = server.server_address[1]
    pairs = [("a.live", "b.live"), ("b.live", "a.live")] * 6
    urls = [f"http://{one}:{port}/to/{other}/busy/{i}" for i, (one, other) in enumerate(pairs)]
    rows = download(tmp_path, urls, connections_per_host=1, retries=0)
    assert not any(isinstance(row, Rejected) for row in rows)


@pytest.mark.usefixtures("names")
def test_failures_are_those_of_the_host_that_a_redirect_leads_to(
    tmp_path: Path, server: Server
) -> None:
    port = server.server_address[1]
    urls = [f"http://from.live:{port}/to/target.live/slow/{i}" for i in range(30)]
    urls.append(f"http://from.live:{port}/ok")
    options = {"total_seconds": 0.2, "retries": 0, "connections_per_host": 2}
    *failed, good = download(tmp_path, urls, **options)
    assert "target.live was given up on after 10 failures" in failed[-1].detail
    assert server.busiest["slow"] >= 1
    assert good["image"] == server.image


@pytest.mark.usefixtures("names")
def test_names_that_nobody_answers_for_hold_up_no_other(tmp_path: Path, server: Server) -> None:
    port = server.server_address[1]
    urls = [f"http://h{i}.{'dead' if i < 40 else 'live'}:{port}/ok/{i}" for i in range(50)]
    rows = download(tmp_path, urls, retries=0, connect_seconds=0.3, total_seconds=2)
    assert [getattr(row, "detail", None) for row in rows[40:]] == [None] * 10
    assert all("no address in 0.3 s" in row.detail for row in rows[:40])


@pytest.mark.parametrize(
    ("path", "reason", "detail", "asked"),
    [
        ("/404", "download_failed", "HTTP 404 Not Found", 1),
        ("/500", "download_failed", r"HTTP 500 .* \(2 attempts\)", 2),
        ("/slow", "download_failed", "no answer in 0.6 s", 2),
        ("/drip", "download_failed", "no answer in 0.6 s", 2),
        ("/short", "download_failed", "ClientPayloadError", 2),
        ("/later", "download_failed", "HTTP 429 .*Retry-After 3600 s", 1),
        ("/loop", "download_failed", "more than 3 redirects", 4),
        ("/astray", "download_failed", "HTTP 302 without a Location", 1),
        ("/tofile", "download_refused", "'file:///etc/passwd' is no http", 1),
        ("/html", "download_not_image", "image/png, 17 bytes: b'<html>", 1),
        ("/huge", "download_too_large", "Content-Length 200,", 1),
        ("/stream", "download_too_large", "over 100,000 bytes", 1),
        ("/noai", "download_disallowed", "X-Robots-Tag", 1),
    ],
)
def test_a_failed_download_is_a_reason_and_not_an_error(
    path: str, reason: str, detail: str, asked: int, tmp_path: Path, server: Server
) -> None:
    failed, good = download(tmp_path, [server.url(path), server.url("/ok")])
    assert failed.reason == reason
    assert re.search(detail, failed.detail)
    assert server.url(path) in failed.detail
    assert server.asked[path] == asked
    assert failed.origin == "list.jsonl row 0"
    assert good["image"] == server.image


def test_what_fails_once_is_tried_again(tmp_path: Path, server: Server) -> None:
    (row,) = download(tmp_path, [server.url("/once503")])
    assert row["image"] == server.image
    assert server.asked["/once503"] == 2


def test_redirects_are_followed(tmp_path: Path, server: Server) -> None:
    (row,) = download(tmp_path, [server.url("/redirect")])
    assert row["image"] == server.image


def test_a_host_that_fails_again_and_again_is_given_up_on(tmp_path: Path, server: Server) -> None:
    urls = [server.url(f"/slow/{i}") for i in range(30)]
    rows = download(tmp_path, urls, total_seconds=0.05, retries=0, connections_per_host=2)
    assert [row.reason for row in rows] == ["download_failed"] * 30
    assert server.asked.total() <= 12
    assert "given up on after 10 failures" in rows[-1].detail


DEAD = [f"http://127.0.{at // 200}.{at % 200 + 2}:9/a.png" for at in range(120)]


def test_when_nothing_can_be_reached_no_row_is_to_blame(tmp_path: Path) -> None:
    with pytest.raises(OutageError, match="the network is down here"):
        download(tmp_path, DEAD, retries=0)


def test_a_network_that_drops_what_is_sent_is_no_rows_fault(tmp_path: Path) -> None:
    with socket.socket() as full:
        # On every address of this machine; whoever comes when its queue is full gets no answer.
        full.bind(("", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        urls = [url.replace(":9/", f":{port}/") for url in DEAD]
        with pytest.raises(OutageError, match=r"could not be connected to.*the network is down"):
            download(tmp_path, urls, retries=0, connect_seconds=0.2)
        for one in waiting:
            one.close()


def test_hosts_that_are_gone_are_no_outage(tmp_path: Path, server: Server) -> None:
    rows = download(tmp_path, [server.url("/ok"), *DEAD], retries=0, concurrency=1)
    assert [isinstance(row, Rejected) for row in rows] == [False] + [True] * len(DEAD)


@pytest.mark.parametrize("unit_rows", [1000, len(DEAD)])
def test_a_unit_may_begin_with_hosts_that_are_gone(
    unit_rows: int, tmp_path: Path, server: Server
) -> None:
    urls = [*DEAD, *(server.url(f"/ok/{i}") for i in range(10))]
    rows = download(tmp_path, urls, retries=0, unit_rows=unit_rows)
    assert [isinstance(row, Rejected) for row in rows] == [True] * len(DEAD) + [False] * 10


def test_a_unit_of_hosts_that_are_gone_is_no_outage_after_one_that_was_not(
    tmp_path: Path, server: Server
) -> None:
    download(tmp_path, [server.url("/ok")])
    assert len(download(tmp_path, DEAD, retries=0)) == len(DEAD)


def test_names_are_resolved_to_public_addresses_only(tmp_path: Path, server: Server) -> None:
    url = server.url("/ok").replace("127.0.0.1", "localhost")
    (refused,) = download(tmp_path, [url], allow_private=False)
    assert "localhost has private addresses only (source.allow_private)" in refused.detail
    assert server.asked.total() == 0
    (row,) = download(tmp_path, [url])
    assert row["image"] == server.image


def test_a_refused_connection_is_told(tmp_path: Path) -> None:
    (row,) = download(tmp_path, ["http://127.0.0.1:9/a.png"])
    assert row.reason == "download_failed"
    assert "(2 attempts)" in row.detail


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:127.0.0.1]/",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "not a url",
        "http://",
        "http://[1/",
        "",
    ],
)
def test_only_public_web_addresses_are_asked(url: str, tmp_path: Path) -> None:
    (row,) = download(tmp_path, [url], allow_private=False)
    assert row.reason == "download_refused"


def test_a_redirect_to_a_private_address_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rwkv_clip.addresses.is_public",
        lambda address: address == "127.0.0.1" or is_public(address),
    )
    (row,) = download(tmp_path, [server.url("/tometadata")], allow_private=False)
    assert (row.reason, "169.254.169.254" in row.detail) == ("download_refused", True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False),
        ("192.168.1.1", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False), ("64:ff9b::5db8:d822", True),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after(email.utils.formatdate(1_000_030, usegmt=True), now=1_000_000) == 30
    assert retry_after(email.utils.formatdate(0, usegmt=True)) == 0
    assert retry_after("soon") == retry_after(None) == 0


def test_a_date_without_a_zone_is_greenwich_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        try:
            assert retry_after(time.asctime(time.gmtime(1_000_030)), now=1_000_000) == 30
            assert retry_after("Mon, 12 Jan 1970 13:47:10 -0000", now=1_000_000) == 30
        finally:
            patch.undo()
            time.tzset()


def test_lists_may_be_parquet_with_other_columns(tmp_path: Path, server: Server) -> None:
    table = pa.table({"URL": [server.url("/ok"), None], "TEXT": ["hi", "ho"], "key": [5, 6]})
    pq.write_table(table, tmp_path / "part.parquet")
    columns = {"url": "URL", "web_text": "TEXT", "id": "key"}
    good, bad = rows_of(source(tmp_path / "part.parquet", columns=columns))
    assert (good["id"], good["web_text"], good["image"]) == ("5", "hi", server.image)
    assert (bad.id, bad.reason) == ("6", "download_refused")


def test_urls_may_be_plain_bytes(tmp_path: Path, server: Server) -> None:
    table = pa.table({"url": [server.url("/ok").encode()], "text": [b"hi"]})
    pq.write_table(table, tmp_path / "part.parquet")
    (row,) = rows_of(source(tmp_path / "part.parquet"))
    assert row["image"] == server.image


def test_a_list_without_urls_is_found_before_work(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("link,text\nhttp://example.com,hi\n")
    with pytest.raises(SourceError, match=r"columns.url: .*no column 'url'.*it has link, text"):
        source(tmp_path).units()


def test_reading_may_stop_in_the_middle(tmp_path: Path, server: Server) -> None:
    (tmp_path / "list.jsonl").write_text(
        "".join(
            json.dumps({"url": server.url(f"/busy/{i}"), "text": "x"}) + "\n" for i in range(99)
        )
    )
    one = source(tmp_path, concurrency=4)
    rows = one.read(one.units()[0])
    next(rows)
    rows.close()
    assert server.asked.total() < 60
    assert not [thread for thread in threading.enumerate() if thread.name == "downloads"]
