"""Steering files of lm-evaluation-harness: read its CSV and .pt files as edits, and write edits as its .pt file.

The harness's model type `steered` takes a row (or an entry) for each module of the model, and edits that module's
output at every token, the first and padding included: `add` adds `coefficient * vector`, and `clamp` sets the
projection of `x - bias` on the vector to the coefficient. A CSV names an SAE instead of a vector, whose decoder row and
`b_dec` are vector and bias.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.disk import write_file
from ...shared.core.errors import DataError, InterventionError
from ...shared.core.paths import user_path
from ...shared.intervene.edits import Add, Clamp, Edit, Orthogonal
from ...shared.intervene.sae_model import SaeModel
from ...shared.intervene.spliced_model import Target
from ...shared.model.capture import resolve_hook_points
from ...shared.model.hook_points import ResolvedHookPoint
from ...shared.sae import Sae
from ...shared.sae.formats.reading import read_torch_archive

_COLUMNS = ("sparse_model", "hookpoint", "feature_index", "steering_coefficient")
_ACTIONS = ("add", "clamp")


def read_lm_eval(lm: SaeModel, path: str | Path) -> dict[Target, Edit]:
    """Return the edits of a steering file of lm-evaluation-harness, for `SaeModel.steer`.

    The logits are those of the harness if the model was opened with `skip_first_token=False`, as the harness edits a
    text's first token too. The SAEs that a CSV names are loaded, and need not be in the model.

    Raises:
        DataError: the file cannot be read, or asks for what the harness or an edit does not do.
        HookPointError: the model has no such module.
        MissingFileError, SaeError: an SAE is not there or has no such latent.
    """
    path = user_path(path)
    entries = _pt_entries(path) if path.suffix in (".pt", ".pth") else _csv_entries(path)
    edits: dict[Target, Edit] = {}
    for place, entry in entries.items():
        vector, coefficient, bias = entry["steering_vector"], entry["steering_coefficient"], entry["bias"]
        norm = float(vector.double().norm())
        if entry["action"] == "add":
            if bias is not None and path.suffix in (".pt", ".pth"):
                raise DataError(f"'{path.name}' adds at '{place}' with a bias, which the harness refuses; leave it out")
            edit: Edit = Add(coefficient * norm)
        else:
            shift = 0.0 if bias is None else float(bias.double() @ vector.double()) / norm
            edit = Clamp(coefficient + shift)
        edits[_full_path(lm, place), vector] = edit
    return edits


def write_lm_eval(lm: SaeModel, edits: Mapping[Target, Edit], path: str | Path) -> Path:
    """Write edits as a .pt file that lm-evaluation-harness's model type `steered` loads, and return its path.

    `Add` of a latent or a direction, `Clamp(x)` of a direction and `Orthogonal(0)` of both are what the harness can do,
    at all tokens, where the activation is a module's own output. It does so at a text's first token too.

    Raises:
        InterventionError: an edit is something else, or two do not go together at one hook point.
        HookPointError: there is no such SAE, latent or hook point.
    """
    entries: dict[str, dict[str, Any]] = {}
    for target, edit in edits.items():
        for point, entry in _written(lm, target, edit):
            place = _place(lm, point)
            before = entries.setdefault(place, entry)
            if before is entry:
                continue
            if not before["action"] == entry["action"] == "add":
                raise InterventionError(
                    f"lm-evaluation-harness makes one edit at a module, and '{place}' has two; only additions merge"
                )
            total = sum(each["steering_coefficient"] * each["steering_vector"] for each in (before, entry))
            entries[place] = before | {"steering_vector": total, "steering_coefficient": 1.0}
    content = io.BytesIO()
    torch.save(entries, content)
    path = user_path(path)
    write_file(path, content.getvalue())
    return path


def _csv_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a CSV by module."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read '{path}': {error}; expected a CSV or .pt file of lm-evaluation-harness") from None
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise DataError(f"'{path}' has no column {missing[0]} or no row; expected {', '.join(_COLUMNS)}")
    entries: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=2):
        where = f"line {number} of '{path.name}'"
        if row.get("head_index"):
            raise DataError(f"{where} has a head_index, which the harness ignores; leave it empty")
        sae, place = _sae(row, where)
        latent, coefficient = (
            _number(row, "feature_index", int, where),
            _number(row, "steering_coefficient", float, where),
        )
        if not 0 <= latent < sae.d_sae:
            raise DataError(f"{where} names latent {latent}; the SAE has {sae.d_sae:,} from 0 on")
        entry = {"action": row.get("action") or "add", "steering_coefficient": coefficient}
        entry |= {"steering_vector": sae.W_dec[latent].detach(), "bias": sae.b_dec.detach()}
        _keep(entries, place, entry, where)
    return entries


def _sae(row: Mapping[str, str], where: str) -> tuple[Sae, str]:
    """Return the SAE that a row names, and the module whose output it edits."""
    loader, name, place = row.get("loader") or "sparsify", row["sparse_model"] or "", row["hookpoint"] or ""
    if loader == "sparsify":
        folder = user_path(name) / place
        sae = Sae.load(folder if user_path(name).exists() else f"hf://{name}/{place}")
    elif loader == "sae_lens":
        identity = row.get("sae_id") or ""
        sae = Sae.load(f"hf://{name}/{identity}" if "/" in name else f"{name}/{identity}")
        place = place or sae.hook_point
    else:
        raise DataError(f"{where} has the loader '{loader}'; expected sparsify or sae_lens")
    if sae.wiring_kind != "sae" or sae.folded:
        about = f"is a {sae.wiring_kind}" if not sae.folded else f"was loaded with {sae.folded[0]} folded in"
        raise DataError(f"{where}: the SAE of '{place}' {about}, so its decoder is not the harness's; give a .pt file")
    return sae, place


def _number(row: Mapping[str, str], key: str, kind: type, where: str) -> Any:
    try:
        return kind(row[key])
    except (TypeError, ValueError):
        raise DataError(f"{where} has {key} = '{row[key]}'; expected a number") from None


def _pt_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a .pt file by module."""
    if not path.is_file():
        raise DataError(f"cannot read '{path}': no such file; expected a CSV or .pt file of lm-evaluation-harness")
    described: dict[str, Any] = {}
    read_torch_archive(path, f"the steering file '{path}'", described)
    entries: dict[str, dict[str, Any]] = {}
    for place, given in described.items():
        where = f"'{place}' of '{path.name}'"
        if not isinstance(given, dict) or not isinstance(vector := given.get("steering_vector"), Tensor):
            raise DataError(f"{where} has no steering_vector; expected one, an action and a steering_coefficient")
        if given.get("head_index") is not None:
            raise DataError(f"{where} has a head_index; expected an edit of the whole activation")
        entry = {"action": given.get("action"), "steering_coefficient": float(given.get("steering_coefficient", 1.0))}
        _keep(entries, place, entry | {"steering_vector": vector, "bias": given.get("bias")}, where)
    return entries


def _keep(entries: dict[str, dict[str, Any]], place: str, entry: dict[str, Any], where: str) -> None:
    if entry["action"] not in _ACTIONS:
        raise DataError(f"{where} has the action '{entry['action']}'; expected add or clamp")
    vector, bias = entry["steering_vector"], entry["bias"]
    if vector.ndim != 1 or not bool(vector.any()) or (bias is not None and bias.shape != vector.shape):
        raise DataError(f"{where} has a vector {list(vector.shape)}; expected one that is not zero, and a bias like it")
    if place in entries:
        raise DataError(f"{where} edits '{place}' again, and the harness keeps only the last; give one for each")
    entries[place] = entry


def _full_path(lm: SaeModel, place: str) -> str:
    """Return a module's path in the model from that in the model without its head, which is the harness's."""
    base = lm.model.base_model
    prefix = next((name for name, module in lm.model.named_modules() if module is base), "")
    inside = dict(base.named_modules())
    return f"{prefix}.{place}" if prefix and place in inside else place


def _place(lm: SaeModel, point: ResolvedHookPoint) -> str:
    """Return the harness's name of the module whose output a hook point is."""
    if point.kind != "output" or point.scale != 1 or point.affine is not None:
        raise InterventionError(
            f"'{point.name}' is no module's own output, which is all that lm-evaluation-harness edits; expected "
            "one such as resid_post"
        )
    module = lm.model.get_submodule(point.module_path)
    for name, other in lm.model.base_model.named_modules():
        if other is module:
            return name
    raise InterventionError(
        f"'{point.name}' is outside of {type(lm.model.base_model).__name__}; the harness edits inside"
    )


def _written(lm: SaeModel, target: Target, edit: Edit) -> list[tuple[ResolvedHookPoint, dict[str, Any]]]:
    """Return the harness's entry for an edit, for each hook point that it acts at."""
    name, which = target
    if edit.where != "all":
        raise InterventionError(f"lm-evaluation-harness edits all tokens, not where={edit.where!r}; expected 'all'")
    if isinstance(which, Tensor):
        (point,) = resolve_hook_points(lm.model, [name]).values()
        return [(point, _entry(edit, which.detach() / which.detach().norm(), 1.0, of_latent=False))]
    latent = lm.latent_edit(name, which, edit)
    one = lm.attached[latent.site]
    if one.sae.rescales_rows:
        raise InterventionError(f"the SAE at '{name}' scales rows, and lm-evaluation-harness adds the same to all")
    found = [(point, one.contribution(which, write)) for write, point in enumerate(one.writes)]
    return [
        (point, _entry(edit, row.detach(), latent.one, of_latent=True))
        for point, row in found
        if row is not None and bool(row.any())
    ]


def _entry(edit: Edit, vector: Float[Tensor, " d"], one: float, of_latent: bool) -> dict[str, Any]:
    """Return the harness's entry for an edit of a latent, by its decoder row, or of a direction, by its unit vector."""
    if isinstance(edit, Add):
        action, coefficient = "add", edit.amount * one
    elif isinstance(edit, Orthogonal) and edit.keep == 0:
        action, coefficient = "clamp", 0.0
    elif isinstance(edit, Clamp) and edit.high is None and not of_latent:
        action, coefficient = "clamp", edit.low
    else:
        raise InterventionError(
            f"lm-evaluation-harness adds vectors and sets projections; it cannot {edit!r} of a "
            f"{'latent' if of_latent else 'direction'}; expected Add, Orthogonal(0), or Clamp(x) of a direction"
        )
    return {
        "steering_vector": vector.cpu().clone(),
        "steering_coefficient": coefficient,
        "action": action,
        "bias": None,
        "head_index": None,
    }
