"""The kinds of SAEs that are saved: how latents are chosen, times what is read and written."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...core.errors import SaeError

SELECTIONS = ("standard", "topk", "jumprelu", "gated")
"""How latents are chosen: by ReLU, the k largest, above a threshold each, or where a gate is open."""
AUTOENCODER_SELECTIONS = ("abstopk", "matching_pursuit")
"""How autoencoders alone may choose: the k largest by absolute value, with their signs, or one after another."""
REFINED_SELECTIONS = ("lista", "leave_one_out")
"""How autoencoders of Thresher alone may choose: again, after a look at what a first choice leaves unexplained."""
ROW_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
"""SAELens's names of how each row may be normalised by its own statistics before it is encoded."""
PURSUIT: dict[str, Any] = {"residual_threshold": 1e-2, "max_iterations": None, "stop_on_duplicate_support": True}
"""When matching pursuit finishes a row (see `matching_pursuit`), with SAELens's defaults; None is d_in iterations."""


class Kind(NamedTuple):
    """How an SAE's latents are chosen, what it reads and writes, and whether it has a skip path.

    `wiring` is `sae`, which writes the hook point that it reads, `transcoder`, which writes another, or `crosscoder`,
    which reads or writes several.
    """

    selection: str
    wiring: str = "sae"
    skip: bool = False

    @property
    def name(self) -> str:
        """The `architecture` in `cfg.json`, SAELens's where it has the kind: `jumprelu_skip_transcoder`."""
        if self.wiring == "sae":
            return self.selection
        selection = [] if self.selection == "standard" else [self.selection]
        return "_".join([*selection, *(["skip"] if self.skip else []), self.wiring])

    @property
    def is_signed(self) -> bool:
        """Whether latents may be negative."""
        return self.selection == "abstopk"

    @property
    def chooses_k(self) -> bool:
        """Whether the k largest latents of a row are chosen."""
        return self.selection in ("topk", "abstopk")

    @property
    def is_tied(self) -> bool:
        """Whether the decoder encodes too, so that there is no encoder of its own."""
        return self.selection == "matching_pursuit"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that the weights file holds."""
        if self.is_tied:
            return ("W_dec", "b_dec")
        biases = ("b_gate", "b_mag", "r_mag") if self.selection == "gated" else ("b_enc",)
        threshold = ("threshold",) if self.selection == "jumprelu" else ()
        threshold = ("threshold", "first_threshold") if self.selection in REFINED_SELECTIONS else threshold
        return ("W_enc", "W_dec", "b_dec", *biases, *threshold, *(("W_skip",) if self.skip else ()))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `cfg.json` that only some kinds have."""
        selection = ("k", "rescale_acts_by_decoder_norm") if self.chooses_k else ()
        selection = tuple(PURSUIT) if self.is_tied else selection
        selection = ("refine_rate",) if self.selection == "lista" else selection
        places = {"sae": (), "transcoder": ("d_out",), "crosscoder": ("hook_points", "reads", "writes", "d_out")}
        return (*selection, *places[self.wiring])


SAE_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *map(Kind, SELECTIONS + AUTOENCODER_SELECTIONS + REFINED_SELECTIONS),
        *(
            Kind(selection, wiring, skip)
            for wiring in ("transcoder", "crosscoder")
            for skip in (False, True)
            for selection in SELECTIONS
        ),
    )
}


def find_kind(name: str, where: str = "this SAE") -> Kind:
    """Return the kind with a name.

    Raises:
        SaeError: there is none.
    """
    if name not in SAE_KINDS:
        raise SaeError(f"{where}: architecture '{name}' is not supported; expected one of: {', '.join(SAE_KINDS)}")
    return SAE_KINDS[name]
