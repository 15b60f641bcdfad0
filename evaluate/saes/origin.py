"""Compare an SAE's recorded training data with the store: another model is an error, other differences are noted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...shared.core.errors import SaeError
from ...shared.model.content import stored_model_content
from ...shared.store import ActivationStore
from .sae_folders import EvaluatedSae

Relation = Literal["same", "perhaps", "other"]

_CONTENT = "model_content"
"""Key of an SAE's metadata for the identity of its model's files, as recorded in the store by the harvest."""

TRANSFORMER_LENS = {"gpt2small": "gpt2"}
"""TransformerLens's names of models that differ from their Hugging Face names, both without punctuation."""


def model_relation(a: str, b: str) -> Relation:
    """Return whether two names refer to the same model.

    `gpt2`, `openai-community/gpt2` and the folder `/models/gpt2` are the same. A folder may contain any model, and a
    name that contains another may be an abbreviation of it or a fine-tuned version; these are "perhaps" the same. Any
    other two names are different models.
    """
    short = [re.sub(r"[^a-z0-9]", "", Path(name).name.lower()) for name in (a, b)]
    short = [TRANSFORMER_LENS.get(name, name) for name in short]
    if short[0] == short[1]:
        return "same"
    if any(_is_folder(name) for name in (a, b)) or short[0] in short[1] or short[1] in short[0]:
        return "perhaps"
    return "other"


def _is_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def compare_origins(
    saes: Sequence[EvaluatedSae], store: ActivationStore, allow_other_model: bool = False
) -> dict[str, list[str]]:
    """Return, by SAE name, how its training differs from the store: in dataset, context size, roles or model.

    Raises:
        SaeError: an SAE was trained on a different model than the store's, and `allow_other_model` is false.
    """
    notes = {sae.name: _differences(sae.sae.config | sae.sae.metadata, store) for sae in saes}
    for sae in saes:
        relation, difference = _compare_models(sae.sae.config | sae.sae.metadata, store)
        if relation == "other" and not allow_other_model:
            raise SaeError(
                f"SAE '{sae.name}' {difference}; evaluate it on a store of its model, or set allow_other_model = true"
            )
        if difference:
            notes[sae.name].insert(0, difference)
    return {name: found for name, found in notes.items() if found}


def _compare_models(recorded: Mapping[str, Any], store: ActivationStore) -> tuple[Relation, str]:
    """Return how the SAE's model and the store's relate, and a description of the difference, if any."""
    trained, stored = recorded.get("model_name"), store.metadata.get("model")
    contents = recorded.get(_CONTENT), stored_model_content(store.metadata)
    if all(isinstance(content, str) and "blake2b" in content for content in contents):
        if contents[0] == contents[1]:
            return "same", ""
        return "other", f"was trained on a model '{trained}' whose files are not those of the store's '{stored}'"
    if not trained or not stored:
        return "same", ""
    relation = model_relation(str(trained), str(stored))
    if relation == "same":
        return relation, ""
    other = "another model" if relation == "other" else "perhaps another model"
    return relation, f"was trained on '{trained}', {other} than the store's '{stored}'"


def _differences(recorded: Mapping[str, Any], store: ActivationStore) -> list[str]:
    """Describe the other differences between an SAE's training and the store."""
    found = []
    trained, stored = recorded.get("dataset_path"), store.metadata.get("dataset")
    if trained and stored and Path(str(trained)).name.lower() != Path(str(stored)).name.lower():
        found.append(f"was trained on text of '{trained}', and the store contains '{stored}'")
    size = recorded.get("context_size")
    if isinstance(size, int) and size != store.context_size:
        found.append(f"was trained on contexts of {size:,} tokens, and the store's have {store.context_size:,}")
    roles, used = recorded.get("roles"), store.used_roles
    if store.has_roles and (list(roles) if isinstance(roles, list) else None) != (list(used) if used else None):
        rows = "rows of every role" if not isinstance(roles, list) else f"rows of role {' or '.join(map(str, roles))}"
        found.append(f"was trained on {rows}, and is evaluated on {' or '.join(used or ['every role'])}")
    return found


def note_lines(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line per difference, with the SAEs that it applies to."""
    by_difference: dict[str, list[str]] = {}
    for name, found in notes.items():
        for difference in found:
            by_difference.setdefault(difference, []).append(name)
    lines = []
    for difference, names in by_difference.items():
        shown = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"note: SAE {shown} {difference}" if len(names) == 1 else f"note: SAEs {shown}: each {difference}")
    return lines
