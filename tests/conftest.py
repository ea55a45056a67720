"""Fixtures for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine (see hub_server.py), which huggingface_hub in this process and in those it starts talks to.

    Serve a folder with `hub.add("org/name", folder)`; the cache is a new one, in `tmp_path / "hf"`.
    """
    from huggingface_hub import close_session, constants

    with HubServer() as server:
        home = tmp_path / "hf"
        for variable in (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_CACHE",
        ):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }.items():
            monkeypatch.setenv(variable, value)
        # huggingface_hub read its environment when it was imported
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # nothing is encrypted here, and to load the certificates takes a tenth of a second each time
        monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *_, **__: None)
        close_session()
        yield server
        close_session()
