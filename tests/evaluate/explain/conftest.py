"""An evaluation with feature indexes, for tests of explanations."""

from __future__ import annotations

import pytest

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate


@pytest.fixture(scope="module")
def evaluation(tiny, sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation")
    evaluate(
        EvaluateConfig(
            store=str(tiny.store),
            saes=[str(sweep / "topk_k10"), str(sweep / "standard")],
            output=str(output),
            model=False,
            export=["neuronpedia"],
            bootstrap_samples=0,
        )
    )
    return output
