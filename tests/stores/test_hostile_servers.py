"""Answers of servers that mean no good, and answers that come late."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_lite import store_process
from mergekit_lite.checkpoint.stores import http, mirror, web
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import DESCRIPTION
from mergekit_lite.errors import CheckpointError, UsageError
from mergekit_lite.input_files import MAX_BYTES
from mergekit_lite.object_stores import parse_place, without_secrets


@pytest.mark.parametrize("location", ["http://host:99999999/x", "http://[::1", "http://host:x/", "http://hést/é"])
def test_redirections_to_no_address(location: str) -> None:
    with pytest.raises(http.Unanswered, match="no address"):
        http._target("http://host/model", location)


def test_pages_name_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be a file's name is not asked for, and gets into no message."""
    links = ["config.json", "..%2fx", "%2e%2e", "a%1b%5b31mb", "a%0ab", "unet/", "http://[bad", "x?y", DESCRIPTION]
    page = "".join(f'<a href="{link}">' for link in links).encode()
    monkeypatch.setattr(web, "_answer", lambda *_: (200, {"content-type": "text/html"}, page))
    assert web._links("https://host/model/") == (["config.json"], ["unet"])
    monkeypatch.setattr(web, "MAX_PAGE", len(page))
    with pytest.raises(CheckpointError, match="longer than"):
        web._links("https://host/model/")


def test_an_answer_that_nobody_waited_for_is_none_to_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_process, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_process.ask("sign", "s3://bucket/one")
    assert store_process._process is None


def test_places_that_stores_take_for_others() -> None:
    for url in ("s3://b/a//x", "s3://b//x", "s3://b/./x", "s3://b/a/../x"):
        with pytest.raises(UsageError, match=r"is no URL that can be opened|can't be read or written"):
            parse_place(url)
    assert parse_place("s3://b/a/x/").key == "a/x" and parse_place("s3://b").key == ""


def test_texts_without_secrets() -> None:
    for text in (
        "s3://bucket: is gone", "https://host:8080: is gone", 'at "http://127.0.0.1:9000"', "http://h:90/x@y",
        "hf://org/name@main", "http://[::1]:80/x",
    ):  # fmt: skip
        assert without_secrets(text) == text
    assert without_secrets("s3://KEY:a/b+c@bucket/x is gone") == "s3://…@bucket/x is gone"


def test_many_small_files_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"vocab{n}.txt": RemoteFile(f"https://host/model/vocab{n}.txt", MAX_BYTES, "") for n in range(11)}
    monkeypatch.setattr(mirror, "_files", lambda _: files)
    monkeypatch.setattr(mirror, "_content", lambda _: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="1,100,000,000 bytes in small files"):
        mirror.stand_up("https://host/model")
