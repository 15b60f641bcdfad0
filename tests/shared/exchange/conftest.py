"""A Hub on this machine, with a cache of the test's own."""

import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEC = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub_server.py")
hub_server = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hub_server)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Point `huggingface_hub` at a server of this process, without a token; retries do not wait."""
    from huggingface_hub import constants, file_download

    server = hub_server.HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture
def token(monkeypatch):
    """Log in."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
