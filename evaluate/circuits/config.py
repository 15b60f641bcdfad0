"""Settings of `thresher graph`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ...shared.core.config import Config, Device

_Positive = Annotated[int, Meta(ge=1)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class GraphConfig(Config, frozen=True, kw_only=True):
    """A text, the transcoders of a model, and how much of the graph is found and kept."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the model.")]
    transcoders: Annotated[
        str | Annotated[list[str], Meta(min_length=1)],
        Meta(
            description="A transcoder, a folder of transcoders, or a list: one for each MLP, or one cross-layer "
            "transcoder. MLPs without one are error nodes."
        ),
    ]
    text: Annotated[str, Meta(min_length=1, description="Text whose next token is explained.")]
    output: Annotated[str, Meta(description="Folder for the results and the page.")]
    verify: Annotated[int, Meta(ge=0, description="Strongest edges from latents to check by ablating the latent.")] = 10
    max_nodes: Annotated[_Positive, Meta(description="Most latents in the graph, those of most influence first.")] = (
        4096
    )
    max_logits: Annotated[_Positive, Meta(description="Most logits in the graph.")] = 10
    logit_mass: Annotated[_Share, Meta(description="Probability that the logits make up, if max_logits allows.")] = 0.95
    node_threshold: Annotated[_Share, Meta(description="Share of all influence that the kept nodes make up.")] = 0.8
    edge_threshold: Annotated[_Share, Meta(description="Share of all influence that the kept edges make up.")] = 0.98
    precision: Annotated[Literal["float32", "float64"], Meta(description="Data type of all computations.")] = "float32"
    batch_size: Annotated[_Positive, Meta(description="Targets of one backward pass.")] = 64
    skip_first_token: Annotated[
        bool,
        Meta(description="Leave the token that begins a text (BOS) to error nodes, as SAEs were not trained on it."),
    ] = True
    device: Device = "auto"
    trust_remote_code: Annotated[bool, Meta(description="Run code that comes with the model.")] = False
