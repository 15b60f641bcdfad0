"""Adapt an SAE to the interface that SAEBench (arXiv 2503.09532) expects of custom SAEs.

    from sae_bench.evals.core.main import multiple_evals
    selected = [("topk-k32", saebench_sae("runs/demo/saes/topk-k32", "gpt2"))]

SAEBench itself is not imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..shared.core.errors import HookPointError, SaeError
from ..shared.model.hook_points import canonical_hook_point
from ..shared.sae import Sae
from ..shared.sae.formats.files import saelens_hook_name


@dataclass
class SaeBenchConfig:
    """The fields of SAEBench's `CustomSAEConfig`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    apply_b_dec_to_input: bool
    context_size: int | None = None
    hook_head_index: int | None = None
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    @property
    def architecture_str(self) -> str:
        """The architecture, under the attribute name that the core evaluation of SAEBench 0.6 reads."""
        return self.architecture

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, which SAEBench writes beside its results."""
        return asdict(self)


class SaeBenchSae(nn.Module):
    """An SAE with unit-norm decoder rows and the attributes that SAEBench reads: `cfg`, `device`, `dtype`, weights."""

    def __init__(self, sae: Sae, model_name: str, context_size: int | None = None):
        super().__init__()
        _normalise_decoder(sae)
        self.sae = sae
        layer = layer_of(sae.hook_point)
        self.cfg = SaeBenchConfig(
            model_name=model_name,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            hook_layer=layer,
            hook_name=saelens_hook_name(canonical_hook_point(sae.hook_point)),
            architecture=sae.architecture,
            apply_b_dec_to_input=sae.apply_b_dec_to_input,
            context_size=context_size,
        )
        self.to(dtype=sae.W_enc.dtype, device=sae.W_enc.device)

    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_dec = property(lambda self: self.sae.b_dec)
    b_mag = property(lambda self: self.sae.b_mag if self.sae.architecture == "gated" else self.sae.b_enc)
    dtype = property(lambda self: self.sae.W_enc.dtype)
    device = property(lambda self: self.sae.W_enc.device)

    @property
    def b_enc(self) -> Tensor:
        """The encoder's bias; for a gated SAE, the gate's bias."""
        return self.sae.b_gate if self.sae.architecture == "gated" else self.sae.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents, in the SAE's data type."""
        return self.sae.encode(x.to(self.dtype))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction."""
        return self.sae.decode(feature_acts)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of `x`."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the SAE, and update `cfg` to match."""
        super().to(*args, **kwargs)
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        self.cfg.device = str(self.device)
        return self

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Return whether the decoder rows have unit norm, within the precision of the data type."""
        tolerance = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return bool(((self.W_dec.norm(dim=1).float() - 1).abs() <= tolerance).all())


def layer_of(hook_point: str) -> int:
    """Return the layer of a canonical hook point, or raise `HookPointError`."""
    parts = canonical_hook_point(hook_point).split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise HookPointError(f"expected a hook point such as 'blocks.2.resid_post', got '{hook_point}'")
    return int(parts[1])


@torch.no_grad()
def _normalise_decoder(sae: Sae) -> None:
    norms = sae.W_dec.norm(dim=1)
    if sae.normalizes_rows:
        raise SaeError(
            "SAEBench decodes latents without the rows that they are of, which an SAE with "
            f"{sae.normalize_activations} needs; expected one that takes rows as they are"
        )
    if sae.wiring_kind != "sae":
        raise SaeError(f"SAEBench evaluates SAEs that reconstruct their input, got architecture '{sae.architecture}'")
    sae.check_never_negative("SAEBench")
    if sae.architecture == "topk" and (norms.max() - norms.min()) > 1e-3 * norms.mean():
        raise SaeError(
            f"decoder norms run from {norms.min():.4g} to {norms.max():.4g}: scaling a TopK SAE's rows to unit norm "
            "would change which latents it selects; train it with unit-norm decoder rows"
        )
    sae.fold_decoder_norm()


def saebench_sae(path: str | Path, model_name: str, context_size: int | None = None) -> SaeBenchSae:
    """Load an SAE folder for SAEBench; `model_name` is the model's name in TransformerLens."""
    return SaeBenchSae(Sae.load(path), model_name, context_size)
