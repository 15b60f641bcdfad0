"""The speed of an evaluation: each part is divided by what it worked on, and multiplied by what the whole has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from thresher.evaluate import speed as module
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.saes.sae_folders import load_saes
from thresher.evaluate.speed import EvaluationSpeed, measure_evaluation, model_tokens
from thresher.shared.store import ActivationStore

CONFIG = EvaluateConfig(store="s", saes="a", output="o", device="cpu", batch_size=2)


def test_parts_are_divided_by_their_rows_tokens_and_latents(tiny, sweep, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))  # not that of all threads

    def timed(name, seconds):
        real = getattr(module, name)

        def run(*arguments, **named):
            now[0] += seconds(*arguments)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, run)

    first_time = [50.0]
    timed("accumulate", lambda saes, rows, *_: 0.5 * rows.n_rows)
    timed("accumulate_losses", lambda model, points, saes, rows, _: 2 * rows.usable.size + (first_time or [0]).pop())
    timed("read_blocks", lambda store, *_: 0.25 * store.n_rows)
    timed("logit_effects", lambda model, directions, *_: 3.0 * len(directions))
    store = ActivationStore.open(tiny.store)
    saes = load_saes([sweep / "topk_k2", sweep / "topk_k10"], store, "cpu", {})
    assert len(saes) == 2
    found = measure_evaluation(CONFIG, store, saes, tiny.model, None, tmp_path)
    n_latents = sum(sae.sae.d_sae for sae in saes)
    assert found == pytest.approx(EvaluationSpeed(0.5, 2.0, 0.25, 3.0 * n_latents))
    alone = measure_evaluation(
        EvaluateConfig(store="s", saes="a", output="o", model=False, feature_rows=0),
        store,
        saes,
        tiny.model,
        None,
        tmp_path,
    )
    assert alone == pytest.approx(EvaluationSpeed(0.5, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("settings", "n_tokens", "seconds"),
    [
        ({}, 5_000, 50 + 5_000 * 2 + 7 + 100_000 * 0.5),
        ({"model_rows": 3_000}, 3_000, 50 + 3_000 * 2 + 7 + 100_000 * 0.5),
        ({"max_rows": 1_000}, 1_000, 10 + 1_000 * 2 + 7 + 100_000 * 0.5),
        ({"feature_rows": 10_000}, 5_000, 50 + 5_000 * 2 + 7 + 10_000 * 0.5),
        ({"feature_rows": 0, "model": False}, 0, 50),
    ],
)
def test_what_the_settings_limit_is_not_counted(settings, n_tokens, seconds):
    config = EvaluateConfig(store="s", saes="a", output="o", **settings)
    assert model_tokens(config, 5_000) == n_tokens
    assert EvaluationSpeed(0.01, 2.0, 0.5, 7.0).seconds(config, 100_000, 5_000) == pytest.approx(seconds)
