"""Keys of the environment and of a file."""

import os

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from serve.config import ServeFile
from serve.errors import ApiError
from serve.ingress import Ingress
from serve.keys import VARIABLE, Keys


def is_good(keys: Keys, shown: str | None) -> bool:
    try:
        keys.check(shown)
    except ApiError as error:
        assert error.status == 401
        return False
    return True


def test_without_keys_nobody_is_asked(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert is_good(Keys(), None)


def test_each_of_several_keys_is_good():
    keys = Keys("first, second")
    assert is_good(keys, "Bearer first")
    assert is_good(keys, "bearer second")
    for shown in (None, "", "Bearer", "Bearer third", "Basic first", "first", "Bearer first,"):
        assert not is_good(keys, shown)


def test_a_file_of_keys_may_change(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for the team\nold\n")
    keys = Keys(f"@{file}")
    assert is_good(keys, "Bearer old")
    file.write_text("new\nnewer\n")
    os.utime(file, ns=(1, 1))
    assert is_good(keys, "Bearer newer")
    assert not is_good(keys, "Bearer old")
    file.unlink()
    assert is_good(keys, "Bearer new")
    file.write_text("\n")
    assert is_good(keys, "Bearer new")


@pytest.mark.parametrize("told", ["", " ", ",", "@/nowhere/keys"])
def test_keys_that_are_none_are_told_before_anything_is_served(told):
    with pytest.raises(ValueError, match="holds no key"):
        Keys(told)


@pytest.mark.parametrize("told", ["s3cr3t,#s3cr3t", "s3cr3t, @s3cr3t", "#s3cr3t", "s3\ncr3t"])
def test_keys_that_nobody_could_show_are_told_and_not_written(told):
    with pytest.raises(ValueError, match=r"RWKV_CLIP_API_KEYS: key \d") as refused:
        Keys(told)
    assert "cr3t" not in str(refused.value)


def test_a_file_that_begins_with_a_mark_of_its_encoding_loses_no_key(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes("\ufefffirst\n@second\n".encode())
    keys = Keys(f"@{file}")
    assert is_good(keys, "Bearer first")
    assert is_good(keys, "Bearer @second")


def test_a_file_that_is_away_is_told_once_and_read_when_it_is_back(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = Keys(f"@{file}")
    file.unlink()
    assert all(is_good(keys, "Bearer old") for _ in range(3))
    assert caplog.text.count("cannot be read") == 1
    file.write_text("new\n")
    assert is_good(keys, "Bearer new")
    file.unlink()
    assert is_good(keys, "Bearer new")
    assert caplog.text.count("cannot be read") == 2


def test_a_file_that_gets_a_key_that_nobody_could_show_changes_nothing(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = Keys(f"@{file}")
    file.write_text("a remark\nno\tkey\n")
    os.utime(file, ns=(1, 1))
    assert is_good(keys, "Bearer old")
    assert not is_good(keys, "Bearer a remark")
    assert "key 2 holds a control character" in caplog.text


@pytest.mark.parametrize("key", ["schlüssel", "à", "钥匙"])
def test_a_key_of_other_letters_is_shown_by_its_bytes(key):
    shown = b"Bearer " + key.encode()
    assert is_good(Keys(key), shown.decode("latin-1"))  # as Starlette gives it
    assert not is_good(Keys(key), "Bearer schl")


@pytest.fixture
def ingress():
    """Its class without Serve's wrapping."""
    return Ingress.__bases__[0]


SETTINGS = ServeFile.model_validate({"serve": {"model": "somewhere"}})


def test_a_key_is_needed_under_any_prefix(ray_cluster, ingress, monkeypatch):
    monkeypatch.setenv(VARIABLE, "a-key")
    made = ingress(SETTINGS, None, None, None, None, keyed=True)
    client = TestClient(Starlette(routes=[Mount("/clip", made.__serve_build_asgi_app__())]))
    assert client.get("/clip/healthz").status_code == 200
    for route in ("embeddings", "classify", "search"):
        refused = client.post(f"/clip/v1/{route}", json={})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    for route in ("models", "models/small"):
        assert client.get(f"/clip/v1/{route}").status_code == 401


def test_a_node_without_the_keys_serves_nobody(ray_cluster, ingress, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match="on every node"):
        ingress(SETTINGS, None, None, None, None, keyed=True)
    ingress(SETTINGS, None, None, None, None, keyed=False)
