"""Annotated shapes: every function that names some is checked in all of these tests, and a dimension has one name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from thresher.train.kernels.reference import Reference

from . import shape_checks

ROOT = Path(__file__).parents[1]
ANNOTATION = re.compile(r"\[(?:np\.)?(?:Tensor|ndarray), f?(['\"])(.*?)\1\]")

# The dimensions that several files name. A name with `all_` is the sum over ranks or layers.
SHARED = {
    *("batch", "batch_plus_1", "context", "contexts", "rows", "rows_plus_1", "tokens", "texts", "characters"),
    *("d_in", "d_out", "d_model", "d_sae", "d_sae_plus_1", "d", "width", "shape", "vocabulary"),
    *("latents", "all_latents", "latents_here", "targets", "sources", "groups", "parts", "n_features", "rank"),
    *("nnz", "k", "k_here", "n", "all_n", "m", "n_out", "entries", "peaks", "matches", "chosen", "resamples"),
    *("chunks", "windows", "size"),
}


def dimensions(source: str) -> set[str]:
    """Return the names of the dimensions in a file's annotations, without their marks."""
    found = {name.lstrip("*#") for _, shape in ANNOTATION.findall(source) for name in shape.split()}
    return {name for name in found if name and name not in ("...", "_") and not name.isdigit()}


def test_a_dimension_has_one_name():
    files: dict[str, list[str]] = {}
    for stage in ("shared", "harvest", "train", "evaluate"):
        for file in (ROOT / stage).rglob("*.py"):
            for name in dimensions(file.read_text()):
                files.setdefault(name, []).append(str(file.relative_to(ROOT)))
    assert len(files) > 60
    assert {name: where for name, where in files.items() if len(where) > 1 and name not in SHARED} == {}
    assert {name for name in SHARED if len(files.get(name, [])) < 2} == set()
    odd = {name: where for name, where in files.items() if not re.fullmatch("[a-z][a-z0-9_]*", name)}
    odd |= {f"n_{name}": files[f"n_{name}"] for name in SHARED if f"n_{name}" in files}
    odd |= {f"{name}_size": files[f"{name}_size"] for name in SHARED if f"{name}_size" in files}
    assert odd == {}


def test_dimensions_are_found_in_annotations_only():
    source = 'def f(x: Float[Tensor, "*batch d"], y: Int[np.ndarray, " n+1"], z: Bool[Tensor, "3 ..."]): "[Tensor, b]"'
    assert dimensions(source) == {"batch", "d", "n+1"}


def test_a_shape_that_is_not_the_annotated_one_is_an_error():
    values, indices, W_dec = torch.ones(4), torch.tensor([0, 1, 2, 0]), torch.ones(3, 5)
    offsets = torch.tensor([0, 2, 4])
    assert Reference.decode(values, indices, offsets, W_dec).shape == (2, 5)
    with pytest.raises(BeartypeCallHintViolation, match="the size of dimension nnz is 3 which does not equal"):
        Reference.decode(values, indices[:3], offsets, W_dec)
    with pytest.raises(BeartypeCallHintViolation, match="dtype float32, not "):
        Reference.decode(values, indices.float(), offsets, W_dec)
    with pytest.raises(BeartypeCallHintViolation):
        Reference.decode(values, indices, offsets, W_dec[0])


def test_functions_of_every_stage_are_checked():
    import thresher.evaluate.metrics.reconstruction
    import thresher.shared.sae.sae
    import thresher.train.run  # noqa: F401

    assert shape_checks.n_checked > 150
