"""The search page comes from this server alone."""

import re


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    loaded = re.findall(r"""(?:src|href)="([^"]+)""", answer.text)
    assert "page/page.js" in loaded
    for place in loaded:
        if not place.startswith("data:"):
            assert client.get(f"/{place}").status_code == 200
            assert "//" not in place


def test_what_the_page_does_not_have_is_told(client):
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/nothing.js").json()["error"]["code"] == "not_found"
