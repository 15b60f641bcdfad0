"""The numbers and formulas on docs/concepts.md are those of the code."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from thresher.evaluate.features.rows import HIGH_DENSITY, HIGH_PEAK
from thresher.evaluate.report.definitions import METRICS
from thresher.harvest.config import HarvestConfig

PAGE = " ".join((Path(__file__).parents[2] / "docs/concepts.md").read_text().replace("\u2212", "-").split())


def test_numbers_are_those_of_the_code():
    defaults = {field.name: field.default for field in msgspec.structs.fields(HarvestConfig)}
    assert f"`holdout_fraction` ({defaults['holdout_fraction']:g})" in PAGE
    assert f"1 - density / {HIGH_DENSITY:g}" in PAGE
    assert HIGH_PEAK == 10
    assert "in units of ten standard deviations" in PAGE


@pytest.mark.parametrize("key", ["explained_variance", "ce_loss_score", "kl_div_score"])
def test_formulas_are_those_of_the_report(key):
    formula = next(column.definition for column in METRICS if column.key == key).partition(", ")[0].partition(": ")[0]
    assert formula.replace("_sae", " SAE").replace("_", " ") in PAGE
