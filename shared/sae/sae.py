"""A sparse autoencoder for inference, in raw activation units."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..core.errors import SaeError
from ..core.paths import user_path
from ..model.hook_points import canonical_hook_point
from . import activations
from .formats import SaeParts, find_format, read_sae
from .formats.kinds import PURSUIT, REFINED_SELECTIONS, ROW_NORMALIZATIONS, find_kind
from .html import sae_html, sae_line
from .matching_pursuit import matching_pursuit
from .refinement import leave_one_out, sparse_decode
from .row_normalization import RowStatistics, normalize_rows
from .selection import active_entries, largest
from .sources import locate_source

MODEL_PROCESSING = ("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")
"""TransformerLens's options that change activations: the stream's mean per row, and the heads' outputs."""


class Sae(nn.Module):
    """An SAE, transcoder or crosscoder: `x_hat = decode(encode(x), x)`.

    `W_enc` is `[d_in, d_sae]` and `W_dec` `[d_sae, d_out]`, where d_out is d_in if the SAE reconstructs its input.
    `selection` says how latents are chosen (standard, topk, abstopk, jumprelu, gated, matching_pursuit, lista or
    leave_one_out), `wiring_kind` whether this is an sae, transcoder or crosscoder. `config` holds the hyperparameters
    (such as `k`), `metadata` what else the files say. `format` is the format that it was read from, and `folded` says
    in words what reading folded into the weights. Only an abstopk SAE's latents may be negative (`is_signed`).
    Matching pursuit encodes with its decoder, of which `W_enc` is the transpose.

    With `normalize_activations` layer_norm or constant_norm_rescale, each row is normalised by its own statistics
    before it is encoded. An autoencoder's reconstruction is scaled back with them, so that `decode` needs the rows too.
    A transcoder's is not. Weights and latents are then of normalised rows.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    threshold: nn.Parameter
    first_threshold: nn.Parameter
    W_skip: nn.Parameter
    format: str
    folded: tuple[str, ...]
    is_signed: bool

    _kinds: ClassVar[dict[str, type[Sae]]] = {}

    def __init_subclass__(cls, architecture: str | None = None, **keywords: Any):
        """Let `load` return instances of a subclass for what is saved with its `architecture`."""
        super().__init_subclass__(**keywords)
        if architecture is not None:
            Sae._kinds[architecture] = cls

    def __init__(
        self,
        architecture: str,
        tensors: Mapping[str, Tensor],
        *,
        hook_point: str = "",
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.architecture = architecture
        self.hook_point = hook_point
        self.config = dict(config or {})
        self.metadata = dict(metadata or {})
        self.format, self.folded = "", ()
        kind = find_kind(architecture)
        self.selection, self.wiring_kind = kind.selection, kind.wiring
        for name in kind.tensor_names:
            self.register_parameter(name, nn.Parameter(tensors[name].detach(), requires_grad=False))
        if kind.is_tied:
            self.config = PURSUIT | self.config
            self.W_enc = nn.Parameter(self.W_dec.T, requires_grad=False)
        self.is_signed = kind.is_signed
        self.d_in, self.d_sae = self.W_enc.shape
        self.d_out = self.W_dec.shape[1]
        self.apply_b_dec_to_input = bool(self.config.get("apply_b_dec_to_input", kind.wiring != "transcoder"))
        if kind.is_tied and not self.apply_b_dec_to_input:
            raise SaeError(
                f"a {architecture} SAE adds the b_dec that it subtracts; expected apply_b_dec_to_input = true"
            )
        self.normalize_activations = str(self.config.get("normalize_activations") or "none")
        if self.normalize_activations not in ("none", *ROW_NORMALIZATIONS):
            raise SaeError(
                f"normalize_activations is '{self.normalize_activations}', expected one of: "
                f"{', '.join(('none', *ROW_NORMALIZATIONS))}"
            )
        if self.normalizes_rows and kind.wiring == "crosscoder":
            raise SaeError(f"a {architecture} reads several hook points, and cannot normalise rows; expected 'none'")
        if self.normalizes_rows and kind.selection in REFINED_SELECTIONS:
            raise SaeError(f"a {architecture} SAE chooses from a row twice, and cannot normalise rows; expected 'none'")
        k = self.config.get("k")
        if kind.chooses_k and not (isinstance(k, Integral) and 1 <= int(k) <= self.d_sae):
            raise SaeError(f"k is {k!r}, expected 1 to d_sae = {self.d_sae}")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> Sae:
        """Load an SAE of any format that docs/formats.md lists, whichever its files are.

        `path` is a folder, a file, `hf://USER/REPO/path@revision` on the Hugging Face Hub, or the name of a release
        that SAELens knows, such as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.

        Weights are of type `dtype`, or with None of that of the file. On a CPU, those of safetensors are mapped into
        memory, so that they may be larger than it, unless their type changes.

        Raises:
            MissingFileError: there is no SAE at `path`.
            SaeError: it is damaged or of an unsupported kind.
            HubError: the Hub does not give it.
        """
        located = locate_source(path)
        parts = read_sae(located.path, dtype, located.stated)
        sae = cls._kinds.get(parts.architecture, cls)._of(parts).to(device)
        sae.metadata = located.metadata | {key: value for key, value in sae.metadata.items() if value not in (None, {})}
        return sae

    @classmethod
    def _of(cls, parts: SaeParts) -> Sae:
        sae = cls(
            parts.architecture,
            parts.tensors,
            hook_point=parts.hook_point,
            config=parts.config,
            metadata=parts.metadata,
        )
        sae.format, sae.folded = parts.format, parts.folded
        if sae.config.pop("rescale_acts_by_decoder_norm", False) and sae.selection in ("topk", "abstopk"):
            sae.fold_decoder_norm()
        return sae

    def parts(self) -> SaeParts:
        """Return what a writer of a format needs: the tensors, without copies, and what is known of the SAE."""
        config = self.config | {"apply_b_dec_to_input": self.apply_b_dec_to_input}
        config |= {"normalize_activations": self.normalize_activations} if self.normalizes_rows else {}
        tensors = {name: self.get_parameter(name).detach() for name in find_kind(self.architecture).tensor_names}
        return SaeParts(self.architecture, tensors, self.hook_point, config, dict(self.metadata))

    @property
    def target_hook_point(self) -> str:
        """The hook point that is reconstructed: a transcoder's output, and otherwise `hook_point`.

        Raises:
            SaeError: a transcoder does not name its output.
        """
        name = self.metadata.get("hook_name_out")
        if not name and self.wiring_kind == "transcoder":
            raise SaeError(
                f"this {self.architecture} of '{self.hook_point}' does not say which hook point it reconstructs; "
                "add hook_name_out to the metadata in its cfg.json"
            )
        return canonical_hook_point(name) if name else self.hook_point

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook points that are read, whose rows lie side by side in this order."""
        several = self.config.get("reads") or self.config.get("hook_points")
        return (self.hook_point,) if several is None else tuple(several)

    @property
    def writes(self) -> tuple[str, ...]:
        """The hook points that are reconstructed, whose rows lie side by side in this order.

        Raises:
            SaeError: a transcoder does not name its output.
        """
        several = self.config.get("writes") or self.config.get("hook_points")
        return (self.target_hook_point,) if several is None else tuple(several)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_enc.device

    @property
    def normalizes_rows(self) -> bool:
        """Whether each row is normalised by its own statistics before it is encoded."""
        return self.normalize_activations != "none"

    @property
    def rescales_rows(self) -> bool:
        """Whether reconstructions are scaled back by the statistics of the rows that were encoded."""
        return self.normalizes_rows and self.wiring_kind == "sae"

    _repr_html_ = sae_html  # what notebooks show
    extra_repr = sae_line  # what `print` shows

    def decoder_norms(self, n_targets: int = 1) -> Float[Tensor, "d_sae targets"]:
        """Return the norm of each latent's decoder row for each of the targets, which are side by side."""
        return self.W_dec.detach().float().view(self.d_sae, n_targets, -1).norm(dim=2)

    @property
    def model_processing(self) -> list[str]:
        """How TransformerLens rewrote the weights of the model that the SAE was trained on, where activations changed.

        A store holds activations of the model as it is published.
        """
        kwargs = self.metadata.get("model_from_pretrained_kwargs")
        return [name for name in MODEL_PROCESSING if isinstance(kwargs, dict) and kwargs.get(name)]

    def check_never_negative(self, user: str) -> None:
        """Raise `SaeError` if latents may be negative, where `user` takes only those that are not."""
        if self.is_signed:
            raise SaeError(
                f"{user} takes latents that are never negative, and those of this {self.architecture} SAE may be; give "
                "each sign a latent of its own first: thresher sae convert SOURCE FOLDER --format sparsify"
            )

    def save(self, path: str | Path, format: str = "saelens") -> Path:
        """Write the SAE as a folder that `Sae.load` and SAELens's `SAE.load_from_disk` read, or in another format.

        Raises:
            SaeError: the format cannot hold this SAE as it is; nothing is written.
        """
        write = find_format(format).write
        assert write is not None
        write(self.parts(), user_path(path))
        return user_path(path)

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Give the decoder rows unit norm; reconstructions stay as they are, latents take the norms.

        For `topk` and `abstopk` this is exact only where selection weighs pre-activations by the decoder norms.

        Raises:
            SaeError: the decoder encodes too, so that other norms would choose other latents.
        """
        if self.selection == "matching_pursuit":
            raise SaeError("decoder norms of a matching_pursuit SAE cannot be folded: they decide which latents fire")
        norm = self.W_dec.norm(dim=1).clamp_min(1e-8)
        self.W_dec.div_(norm[:, None])
        self.W_enc.mul_(norm)
        for name in ("b_enc", "b_gate", "b_mag", "threshold", "first_threshold"):
            if name in self._parameters:
                getattr(self, name).mul_(norm)

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the encoder's linear part: the gate's, for a gated SAE.

        Raises:
            SaeError: latents are chosen one after another, from what is left of a row.
        """
        if self.selection == "matching_pursuit":
            raise SaeError("matching pursuit has no pre-activations: each latent depends on those chosen before")
        centred = self._centred(x)
        return centred @ self.W_enc + (self.b_gate if self.selection == "gated" else self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of rows in raw units; a latent that is not active is 0."""
        if self.selection == "matching_pursuit":
            return self._pursued(self._centred(x))
        pre_acts = self.pre_activations(x)
        if self.selection == "topk":
            return activations.topk(pre_acts, int(self.config["k"]))
        if self.selection == "abstopk":
            return activations.abstopk(pre_acts, int(self.config["k"]))
        if self.selection == "gated":
            magnitude = (pre_acts - self.b_gate) * self.r_mag.exp() + self.b_mag
            return activations.gated(pre_acts, magnitude)
        if self.selection == "jumprelu":
            return activations.jumprelu(pre_acts, self.threshold)
        if self.selection in REFINED_SELECTIONS:
            first = activations.jumprelu(pre_acts, self.first_threshold)
            return (self._chosen_again if self.selection == "lista" else self._left_one_out)(first, x)
        return activations.relu(pre_acts)

    @property
    def encodes_alone(self) -> bool:
        """Whether a latent depends on its own pre-activation only, not on which others are larger."""
        return self.selection in ("standard", "jumprelu", "gated")

    def encode_some(self, x: Float[Tensor, "*batch d_in"], latents: Int64[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
        """Return some latents alone, at the cost of these; only if `encodes_alone`."""
        assert self.encodes_alone

        def of(name: str) -> Tensor:
            return self.get_parameter(name)[latents]

        pre_acts = self._centred(x) @ self.W_enc[:, latents]
        if self.selection == "gated":
            return activations.gated(pre_acts + of("b_gate"), pre_acts * of("r_mag").exp() + of("b_mag"))
        pre_acts = pre_acts + of("b_enc")
        return activations.jumprelu(pre_acts, of("threshold")) if self.selection == "jumprelu" else pre_acts.relu()

    def encode_sparse(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch m"], Int64[Tensor, "batch m"]]:
        """Return the active latents of each row and their indices, padded with zeros to the widest row.

        For `topk` and `abstopk`, m is k.
        """
        if self.selection == "topk":
            top_acts, top_indices = largest(self.pre_activations(x), int(self.config["k"]))
            return top_acts.relu(), top_indices
        if self.selection == "abstopk":
            pre_acts = self.pre_activations(x)
            _, top_indices = largest(pre_acts.abs(), int(self.config["k"]))
            return pre_acts.gather(1, top_indices), top_indices
        return active_entries(self.encode(x))

    def _pursued(self, centred: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of matching pursuit."""
        limit = self.config["max_iterations"]
        latents = matching_pursuit(
            centred.reshape(-1, self.d_in),
            self.W_dec,
            residual_threshold=float(self.config["residual_threshold"]),
            max_iterations=self.d_in if limit is None else int(limit),
            stop_on_duplicate_support=bool(self.config["stop_on_duplicate_support"]),
        )
        return latents.view(*centred.shape[:-1], self.d_sae)

    def decode(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction; a skip transcoder's skip path is `forward`'s.

        `x`, the rows that were encoded, is needed if `rescales_rows`, and otherwise not used.

        Raises:
            SaeError: the rows are needed and not given.
        """
        return self.rescaled(latents @ self.W_dec + self.b_dec, x)

    def decode_sparse(
        self,
        top_acts: Float[Tensor, "batch m"],
        top_indices: Int64[Tensor, "batch m"],
        x: Float[Tensor, "batch d_in"] | None = None,
    ) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction from sparse latents; `x` is that of `decode`."""
        decoded = nn.functional.embedding_bag(top_indices, self.W_dec, mode="sum", per_sample_weights=top_acts)
        return self.rescaled(decoded + self.b_dec, x)

    def row_statistics(self, x: Float[Tensor, "*batch d_in"]) -> RowStatistics | None:
        """Return what scales the reconstructions of rows back, or None unless `rescales_rows`."""
        return normalize_rows(x.to(self.W_enc.dtype), self.normalize_activations)[1] if self.rescales_rows else None

    def rescaled(
        self, x_hat: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what latents and `b_dec` write, `x_hat`, in the units of the rows that were encoded."""
        if not self.rescales_rows:
            return x_hat
        if x is None:
            raise SaeError(
                f"this SAE normalises each row ({self.normalize_activations}), so its latents can be decoded only with "
                "the rows that were encoded: decode(latents, x)"
            )
        statistics = self.row_statistics(x)
        assert statistics is not None
        return x_hat * statistics.scale + statistics.shift

    def skip_path(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:
        """Return what a skip transcoder adds to the reconstruction from latents, `W_skip x`; None for other SAEs."""
        return x.to(self.W_skip.dtype) @ self.W_skip.T if "W_skip" in self._parameters else None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of `x`, or a transcoder's estimate of its target."""
        x_hat, skipped = self.decode(self.encode(x), x), self.skip_path(x)
        return x_hat if skipped is None else x_hat + skipped

    def _chosen_again(self, first: Tensor, x: Tensor) -> Tensor:
        """Return the latents of rows to which a share of what the first choice leaves unexplained is added."""
        x = x.to(self.W_enc.dtype)
        refined = x + float(self.config["refine_rate"]) * (x - sparse_decode(first, self.W_dec) - self.b_dec)
        return activations.jumprelu(self.pre_activations(refined), self.threshold)

    def _left_one_out(self, first: Tensor, x: Tensor) -> Tensor:
        """Return the first choice's latents, each as the best reconstruction without it needs it."""
        left = x.to(self.W_enc.dtype) - sparse_decode(first, self.W_dec) - self.b_dec
        return activations.jumprelu(leave_one_out(first, left, self.W_dec), self.threshold)

    def _centred(self, x: Tensor) -> Tensor:
        x = x.to(self.W_enc.dtype)
        if self.normalizes_rows:
            x, _ = normalize_rows(x, self.normalize_activations)
        return x - self.b_dec if self.apply_b_dec_to_input else x
