"""Open and check the inputs of an evaluation before any activations are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.core.compute.device import choose_device, make_current
from ..shared.core.errors import ConfigError
from ..shared.model.hook_points import ResolvedHookPoint
from ..shared.store import ActivationStore
from .baselines.directions import baseline_saes
from .baselines.refined import refined_saes
from .check_settings import check_settings
from .config import EvaluateConfig
from .metrics.held_out import HeldOut, held_out
from .saes.origin import compare_origins
from .saes.sae_folders import EvaluatedSae, diverged_saes, divergence_notes, load_saes, sae_folders
from .with_model.labelled_texts import LabelProbes, label_probes, read_labelled_texts
from .with_model.probing import Task, probe_tasks
from .with_model.same_model import check_embeddings, check_vocabulary
from .with_model.store_model import model_name, open_model, open_tokenizer, splice_points


@dataclass(frozen=True)
class PreparedEvaluation:
    """The inputs of an evaluation.

    By SAE name, `failed` holds why an SAE cannot be read, `diverged` why its training stopped, and `notes` how its
    training differs from the store.
    """

    config: EvaluateConfig
    output: Path
    device: str
    store: ActivationStore
    rows: HeldOut
    saes: list[EvaluatedSae]
    failed: dict[str, str]
    diverged: dict[str, str]
    notes: dict[str, list[str]]
    model_name: str | None
    model: PreTrainedModel | None
    hook_points: dict[str, ResolvedHookPoint]
    tokenizer: PreTrainedTokenizerBase | None
    tasks: list[Task]
    labelled: LabelProbes | None = None

    @property
    def has_features(self) -> bool:
        """Whether the settings ask for a feature index and the store contains the tokens that it needs."""
        return self.config.feature_rows > 0 and self.store.has_tokens


def prepare_evaluation(config: EvaluateConfig) -> PreparedEvaluation:
    """Open the store, SAEs, model and tokenizer, and check them against each other.

    Raises:
        ConfigError: the settings contradict each other, or the labelled texts are none or too few.
        OutputError: the output cannot be written.
        MissingFileError: the store or an SAE does not exist.
        StoreError: the store is damaged, has no held-out rows, or lacks data that the settings need.
        HookPointError, SaeError: an SAE does not fit the store or is of another model, or no SAE can be read.
        ModelError: the model or the tokenizer cannot be loaded, or the model does not fit the store.
    """
    device = choose_device(config.device)
    make_current(device)
    store = ActivationStore.open(config.store, cache=config.cache, cache_bytes=config.cache_bytes, roles=config.roles)
    check_settings(config, store)
    labelled = None if config.probe_texts is None else read_labelled_texts(config.probe_texts)
    failed: dict[str, str] = {}
    saes = load_saes(sae_folders(config.saes), store, device, failed)
    notes = compare_origins(saes, store, config.allow_other_model)
    for name, note in divergence_notes(saes).items():
        notes.setdefault(name, []).append(note)
    for sae in saes if config.feature_rows else []:
        if sae.sae.is_signed:
            notes.setdefault(sae.name, []).append(
                "has latents that may be negative, so that no feature index is made of it"
            )
    rows = held_out(store, config.max_rows)
    tasks = probe_tasks(rows.subset(config.model_rows), config)
    shows_tokens = config.feature_rows > 0 and store.has_tokens
    model = open_model(config, store, device)
    hook_points = splice_points(model, saes, store) if model is not None else {}
    reads_letters = config.suite == "full" and store.has_tokens
    tokenizer = open_tokenizer(config, store) if shows_tokens or reads_letters or labelled is not None else None
    probes = None
    if labelled is not None:
        if model is None or tokenizer is None:
            lacking = "model" if model is None else "tokenizer"
            raise ConfigError(
                f"probe_texts runs the model on texts, and there is no {lacking}; name one, or leave it out"
            )
        probes = label_probes(labelled, tokenizer, store, config)
    if model is not None:
        check_embeddings(rows, model_name(config, store) or "the model", model)
    if model is not None and isinstance(config.model, str):
        check_vocabulary(rows, config.model, model, config.cache, config.trust_remote_code)
    more, unrefined = refined_saes(saes, rows, config)
    for name, reason in unrefined.items():
        notes.setdefault(name, []).append(reason)
    return PreparedEvaluation(
        config=config,
        output=Path(config.output),
        device=device,
        store=store,
        rows=rows,
        saes=saes
        + more
        + baseline_saes(
            saes, rows, ["pca", "neurons"] if config.suite == "full" else config.baselines, config.block_rows, device
        ),
        failed=failed,
        diverged=diverged_saes(config.saes),
        notes=notes,
        model_name=model_name(config, store),
        model=model,
        hook_points=hook_points,
        tokenizer=tokenizer,
        tasks=tasks,
        labelled=probes,
    )
