"""The notebooks of examples/: each is its script, executed; and what the scripts find is computed again another way."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM

from thresher import ActivationStore, Sae

jupytext = pytest.importorskip("jupytext")

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = EXAMPLES / "notebooks"
MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]_*.py"))
HOOK_POINT = "blocks.2.resid_post"
MAX_BYTES = 300_000


def test_there_is_a_notebook_for_each_script():
    assert [script.stem for script in SCRIPTS] == sorted(path.stem for path in NOTEBOOKS.iterdir())
    assert [script.name[0] for script in SCRIPTS] == [str(number) for number in range(1, len(SCRIPTS) + 1)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script_executed(script):
    path = NOTEBOOKS / f"{script.stem}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    source = jupytext.read(script, fmt="py:percent")
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (source, notebook)]
    assert cells[0] == cells[1], "run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    content = path.read_text()
    assert len(content.encode()) < MAX_BYTES
    assert not re.search(r"/(home|root|tmp|work|Users)/", content)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_links_of_notebooks_lead_somewhere(script):
    links = re.findall(r"\]\(([^)#\s]+)", script.read_text())
    assert links
    assert [link for link in links if not link.startswith("http") and not (NOTEBOOKS / link).exists()] == []


def closure(requirements: list[str]) -> set[str]:
    """Return the names of what requirements install, themselves included, as far as it is installed here."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):
            needed = [Requirement(text) for text in requires(name) or []]
            waiting += [(each, extra) for each in needed for extra in (requirement.extras or {""})]
    return found


def test_the_extra_has_what_notebooks_import_and_what_opens_and_executes_them():
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    extra = closure(project["optional-dependencies"]["notebooks"])
    assert {"jupyterlab", "jupyterlab-widgets"} <= extra
    if find_spec("jupyterlab") is not None:  # an older environment may lack it
        entries = [entry for name in extra for entry in distribution(name).entry_points]
        programs = {entry.name for entry in entries if entry.group == "console_scripts"}
        assert {"jupyter-lab", "jupyter-execute"} <= programs
    installed = extra | closure(project["dependencies"]) | {"thresher"}
    providers = packages_distributions()
    imported = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(script.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert {"matplotlib", "pandas", "torch"} <= imported
    missing = [name for name in imported if not installed & {canonicalize_name(each) for each in providers[name]}]
    assert missing == []


KERNEL = """
from thresher import ActivationStore, Sae, evaluate, harvest, show, train
harvest(model="stdlib-lm", hook_points=["blocks.2.resid_post"], tokens=8192, store="store", holdout_fraction=0.2)
# %%
ActivationStore.open("store")
# %%
table = {"name": "topk", "hook_point": "blocks.2.resid_post", "d_sae": 64, "k": 4}
(folder,) = train(store="store", output="saes", sae=[table], batch_size=512)
# %%
Sae.load(folder)
# %%
rows = evaluate(store="store", saes="saes", output="evaluation", model=False, feature_rows=8192, bootstrap_samples=0)
rows
# %%
import pandas
pandas.DataFrame(rows)[["name", "l0"]]
# %%
show("topk", 0, "evaluation")
"""


def test_a_kernel_shows_bars_and_tables(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    cells = [nbformat.v4.new_code_cell(source) for source in KERNEL.split("# %%\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    shown = ["".join(output.get("data", {}).get("text/html", "") for output in some) for some in outputs]
    bars = [output["data"]["text/plain"] for some in outputs for output in some if is_bar(output)]
    names = [bar.split(":")[0] for bar in bars]
    assert [name for name in names if name in ("harvest", "train")] == ["harvest", "train"]
    assert "8,192 in 32 contexts" in shown[1]
    assert "64, chosen by topk" in shown[3]
    plain = [output.get("data", {}).get("text/plain", "") for some in outputs for output in some]
    assert "Sae(topk, d_in=256, d_sae=64, hook_point='blocks.2.resid_post')" in plain
    assert "<td" in shown[4]
    assert "topk" in shown[4]
    assert not any("expl. var" in output.get("text", "") for output in outputs[4])  # the table is not printed as well
    assert 'class="dataframe"' in shown[5]
    assert "latent 0" in shown[6]


def is_bar(output):
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which all notebooks run, so that the stores and SAEs of one are there for the next."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture
def run(folder, monkeypatch):
    """The function that runs a notebook's cells and returns their names."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    monkeypatch.setattr("thresher.shared.store.local.durable.flush", lambda handle: None)
    monkeypatch.chdir(folder)

    def execute(number):
        (script,) = EXAMPLES.glob(f"{number}_*.py")
        names: dict = {"__name__": f"notebook_{number}"}
        for count, cell in enumerate(jupytext.read(script, fmt="py:percent").cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{script.name}, cell {count}", "exec"), names)
        return names

    return execute


@torch.no_grad()
def test_store(run, capsys):
    names = run(1)
    store, n = names["store"], names["store"].context_size
    tokens = store.tokens(0, n).long()[None]
    states = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(tokens, output_hidden_states=True)
    for layer in range(3):  # the last of the library's states is after the final norm
        expected = states.hidden_states[layer + 1][0]
        stored = store.read(f"blocks.{layer}.resid_post", 0, n).float()
        assert (stored - expected).norm() < 0.02 * expected.norm()  # the model ran in bfloat16
    x = names["x"][HOOK_POINT][names["usable"]].double().numpy()
    squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    n_directions = int((np.cumsum(squares) / squares.sum() < 0.9).sum()) + 1
    assert names["directions"][HOOK_POINT] == n_directions
    assert names["cosines"][0] > 3 * abs(names["in_batch"])
    assert "BOS" in capsys.readouterr().out


@pytest.mark.long
def test_sweep(run):
    table = run(2)["table"]
    variance = table["explained_variance"]
    assert variance["topk-2048-k8"] < variance["topk-2048-k32"]
    for name in (*(name for name in table.index if name.startswith("baseline-pca") and "k32" in name), "random-k32"):
        assert variance[name] < variance["topk-512-k32"] < variance["topk-2048-k32"]
    sae = Sae.load("runs/notebooks/sweep/topk-512-k8")
    store = ActivationStore.open("runs/notebooks/store")
    held = store.held_out_contexts().repeat(store.context_size) & store.row_mask(0, store.n_rows)
    x = store.read(HOOK_POINT, 0, store.n_rows)[held].double().numpy()
    assert variance["topk-512-k8"] == pytest.approx(1 - np_error(sae, x, 8), abs=0.02)  # it took 20,000 of the rows


def np_error(sae, x, k):
    """Return the unexplained variance of a TopK SAE in NumPy and float64."""
    weights = {name: value.detach().double().numpy() for name, value in sae.named_parameters()}
    pre = np.maximum((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"], 0)
    kept = np.where(pre >= np.partition(pre, -k, axis=1)[:, [-k]], pre, 0)
    return ((kept @ weights["W_dec"] + weights["b_dec"] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.long
def test_latent(run):
    names = run(3)
    rows, kinds, store, decode = names["rows"], names["kinds"], names["store"], names["tokenizer"].decode
    assert len(rows) > 500
    for row, kind in list(zip(rows, kinds, strict=True))[::40]:
        before = decode(store.tokens(max(0, int(row) - 60), int(row)).tolist())
        assert store.tokens(int(row), int(row) + 1).item() == names["word"]
        if kind == "loop":
            assert re.search(r"\bfor\b", before) or row % store.context_size < 20
    share, columns, chosen = names["share"], names["columns"], names["chosen"]
    for number, kind in enumerate(names["order"]):
        others = np.delete(share[:, columns.index(chosen[kind])], number)
        assert share[number, columns.index(chosen[kind])] > others.max() + 0.2
    sae, latent = names["sae"], chosen["loop"]
    loops = rows[(kinds == "loop") & names["held_out"][rows]]
    fires = [float(sae.encode(store.read(HOOK_POINT, int(row), int(row) + 1).float())[0, latent]) > 0 for row in loops]
    assert share[0, columns.index(latent)] == pytest.approx(np.mean(fires))


@pytest.mark.long
@torch.no_grad()
def test_steering(run):
    names = run(4)
    lm, latent = names["lm"], names["of_loop"]
    sae, model = lm.saes[HOOK_POINT], lm.model
    tokens = names["clean"].tokens[:1, : int(names["clean"].lengths[0])]
    right, wrong = (lm.tokenizer.encode(text, add_special_tokens=False)[0] for text in (" range", " the"))
    differences = []
    for activation in (0.0, names["strength"][latent]):
        change = -activation * sae.W_dec[latent]

        def take_away(module, inputs, output, change=change):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, -1] += change

        handle = model.transformer.h[2].register_forward_hook(take_away)
        logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        handle.remove()
        differences.append(float(logits[right] - logits[wrong]))
    measured = float(names["measured"][0, names["last"][0], latent])
    assert measured == pytest.approx(differences[0] - differences[1], abs=1e-3)
    assert measured > 0.5
    points = names["points"]
    mine = points[points["latent"] == latent].set_index("strength")
    assert mine["effect"][2.0] > mine["effect"][0.0] + 1
    assert mine["kl"][0.0] == pytest.approx(0, abs=1e-6)
    assert 0 < len(names["idle"]) < len(names["perfect"])


@pytest.mark.long
def test_explanations(run):
    names = run(5)
    means = names["table"].groupby("explainer")["detection"].mean()
    assert means["rules"] > means["token frequency"] + 0.03
    assert means["token frequency"] > means["random latent"] + 0.1
    assert means["random latent"] == pytest.approx(0.5, abs=0.04)
    assert set(names["of_in"]) <= set(names["rules"].index)
    steered = names["steered"]
    assert 0 < (steered["causal_low"] > 0).sum() < len(steered)


@pytest.mark.long
@torch.no_grad()
def test_circuit(run):
    names = run(6)
    found, model = names["found"], names["lm"].model
    effects = dict(zip(names["texts"], names["effects"].values(), strict=True))
    loop, condition = (effects[text] for text in names["texts"])
    assert max(range(len(loop)), key=lambda at: loop[at] - condition[at]) == 2  # `for` or `if`
    rows = pq.read_table(f"{names['run']}/graph-0/verified.parquet").to_pylist()
    tokens = torch.tensor([found.tokens])
    n_logits = 0
    for row in rows:
        source, target = found.nodes[row["source"]], found.nodes[row["target"]]
        assert row["direct_measured"] == pytest.approx(row["direct"], rel=1e-3, abs=1e-4)
        if target.kind != "logit":
            continue
        n_logits += 1
        written = source.value * Sae.load(names["transcoders"][source.layer]).W_dec[source.number]
        values = []
        for some in (0 * written, written):
            change = torch.zeros(tokens.shape[1], len(written))
            change[source.position] = -some
            mlp = model.transformer.h[source.layer].mlp
            handle = mlp.register_forward_hook(lambda _, __, y, change=change: y + change)
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
            values.append(float(logits[target.number] - logits.mean()))
            handle.remove()
        assert row["total_measured"] == pytest.approx(values[1] - values[0], abs=1e-3)
    assert n_logits


@pytest.mark.long
def test_own_activations(run):
    names = run(7)
    store = names["store"]
    assert store.held_out_contexts().tolist() == [number >= names["n_train"] for number in range(store.n_contexts)]
    x = store.read("trunk", 0, store.n_rows)[store.held_out_contexts().repeat(36)].double().numpy()
    topk, neurons = names["rows"]
    assert topk["explained_variance"] == pytest.approx(1 - np_error(names["sae"], x, 8), abs=1e-4)
    assert topk["explained_variance"] > neurons["explained_variance"] + 0.2
    with torch.no_grad():
        read = names["model"](names["images"][names["n_train"] :]).argmax(1)
    of_letter = names["unseen"] == names["letters"].index("e")
    assert torch.equal(names["read_without"]("e", 0, times=0.0), read[of_letter])


@pytest.mark.long
def test_other_formats(run):
    names = run(8)
    exact = {line["format"]: line["largest difference"] for line in names["lines"] if line["files"]}
    assert exact.keys() == {"saelens", "sparsify", "dictionary_learning", "llamascopium"}
    assert all(float(difference) < 1e-5 for difference in exact.values())
    x = names["unseen"].double().numpy()
    for name, label in (("average_l0_32", "a threshold per latent"), ("average_l0_31", "one threshold for all")):
        arrays = {
            key: value.astype(np.float64) for key, value in np.load(names["theirs"] / name / "params.npz").items()
        }
        pre = x @ arrays["W_enc"] + arrays["b_enc"]
        x_hat = np.where(pre > arrays["threshold"], pre, 0) @ arrays["W_dec"] + arrays["b_dec"]
        variance = 1 - ((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert names["table"]["explained_variance"][label] == pytest.approx(variance, abs=0.02)  # other held-out rows
