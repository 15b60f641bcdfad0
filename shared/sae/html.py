"""What notebooks and `print` show of an SAE."""

from __future__ import annotations

from typing import Any

from ..display.html import facts_html


def sae_html(sae: Any) -> str:
    """Return an SAE's sizes, hook points and hyperparameters as a table."""
    numbers = {key: value for key, value in sae.config.items() if isinstance(value, int | float) and key != "d_sae"}
    facts = {
        "latents": f"{sae.d_sae:,}, chosen by {sae.selection}",
        "reads": ", ".join(sae.reads) if sae.hook_point else "not said",
        "width": f"{sae.d_in}" if sae.d_out == sae.d_in else f"{sae.d_in} to {sae.d_out}",
        **numbers,
        "values": f"{str(sae.W_dec.dtype).removeprefix('torch.')} on {sae.device}",
        "model": sae.metadata.get("model_name"),
    }
    return facts_html(f"Sae: {sae.architecture}", facts)


def sae_line(self: Any) -> str:
    """Return an SAE's kind, sizes and hook point in one line."""
    return f"{self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}, hook_point={self.hook_point!r}"
