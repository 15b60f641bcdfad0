"""What `thresher sae info` prints of an SAE."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import SaeError, ThresherError
from ..sae import CrossLayerTranscoder, Sae
from ..sae.formats import SaeFormat
from ..sae.formats.kinds import PURSUIT, REFINED_SELECTIONS


def describe_sae(fmt: SaeFormat, path: Path, root: Path) -> list[str]:
    """Return the lines of `info` on one SAE; why it cannot be read is one of them."""
    name = str(path.relative_to(root)) if path != root else path.name
    lines = [name, f"  format      {fmt.name}: {fmt.layout}"]
    try:
        sae = Sae.load(path, dtype=None)
    except ThresherError as error:
        return [*lines, f"  not read    {error}"]
    lines.append(f"  kind        {sae.architecture}")
    lines.append(f"  reads       {', '.join(sae.reads) if sae.hook_point else 'not said'}")
    try:
        lines.append(f"  writes      {', '.join(sae.writes) if sae.hook_point else 'not said'}")
    except SaeError:
        lines.append("  writes      not said; add hook_name_out to the metadata")
    lines.append(f"  sizes       {sizes_in_words(sae)}, {str(next(sae.parameters()).dtype).removeprefix('torch.')}")
    lines.append(f"  chooses     {selection(sae)}")
    if sae.wiring_kind not in ("transcoder", "cross_layer"):
        lines.append(f"  b_dec       {'' if sae.apply_b_dec_to_input else 'not '}subtracted from the input")
    lines += [f"  folded      {text}" for text in sae.folded]
    if sae.metadata.get("model_name"):
        lines.append(f"  model       {sae.metadata['model_name']}")
    published = sae.metadata.get("published") or {}
    lines += [f"  published   {key} {value}" for key, value in published.items()]
    return lines


def sizes_in_words(sae: Sae) -> str:
    """Return the sizes in words."""
    if isinstance(sae, CrossLayerTranscoder):
        return str(sae.sizes)
    written = f", d_out {sae.d_out}" if sae.d_out != sae.d_in else ""
    return f"d_in {sae.d_in}, d_sae {sae.d_sae:,}{written}"


def selection(sae: Sae) -> str:
    """Return in words how latents are chosen, with k or the range of the thresholds."""
    if sae.config.get("k") is not None and (sae.selection == "topk" or sae.config.get("activation") == "topk"):
        return f"the {sae.config['k']} largest of a row"
    if sae.selection == "abstopk":
        return f"the {sae.config['k']} largest of a row by absolute value, with their signs"
    if sae.selection == "matching_pursuit":
        return _pursuit(sae)
    thresholds = [value for name, value in sae.named_parameters() if name.startswith("threshold")]
    if sae.selection in REFINED_SELECTIONS:
        return f"{sae.selection}: a second time, after a look at what the first choice leaves unexplained"
    if thresholds:
        every = torch.cat([value.detach().float().reshape(-1) for value in thresholds])
        low, middle, high = every.min(), every.median(), every.max()
        return f"above thresholds of {low:.4g} to {high:.4g}, half of them above {middle:.4g}"
    return {"gated": "where a gate is open", "standard": "above zero", "cross_layer": "above zero"}[sae.selection]


def _pursuit(sae: Sae) -> str:
    """Return in words how matching pursuit chooses latents and when it stops."""
    limit, threshold, once = (sae.config[key] for key in PURSUIT)
    stops = [f"a norm below {threshold:.4g} is left"] if threshold > 0 else []
    stops += ["a step chooses no new one"] if once else []
    until = f", or until {' or '.join(stops)}" if stops else ""
    return f"one after another, in {sae.d_in if limit is None else limit} steps{until}"
