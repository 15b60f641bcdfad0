# %% [markdown]
# # 2. A sweep, and how to read its report
#
# How many latents should fire per token, and out of how many? Nobody knows beforehand, so one trains a sweep. Thresher trains all SAEs of a sweep from one stream of
# the store, and judges them on documents that none of them saw. This notebook trains seven SAEs, reads their metrics one after another, and ends with a choice.
#
# Everything runs on the bundled model, in less than two minutes on two CPU cores.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from thresher import evaluate, harvest, train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
hook_point = "blocks.2.resid_post"
store, output = "runs/notebooks/store", "runs/notebooks/sweep"

# %% [markdown]
# ## The sweep
#
# A list in a table is a grid: the first table is four TopK SAEs. The second is the oldest recipe, ReLU with an L1 penalty. The third is a baseline that learns nothing
# but its biases: its directions are random. Any metric on which it does well is a metric to distrust.

# %%
harvest(model="stdlib-lm", hook_points=[hook_point], tokens=500_000, store=store)
folders = train(
    store=store,
    output=output,
    batch_size=2048,
    tokens=300_000,
    sae=[
        {"name": "topk-{d_sae}-k{k}", "hook_point": hook_point, "d_sae": [512, 2048], "k": [8, 32]},
        {
            "name": "l1-{l1_coefficient}",
            "architecture": "standard",
            "l1_coefficient": [2.0, 5.0],
            "d_sae": 2048,
            "hook_point": hook_point,
        },
        {"name": "random-k{k}", "architecture": "random", "k": 32, "d_sae": 2048, "hook_point": hook_point},
    ],
)

# %% [markdown]
# ## The metrics
#
# `evaluate` reads the held-out rows once for all SAEs, then runs the model with each SAE spliced in. It returns a row per SAE; the same table heads `report.html`.
# `baselines` adds principal components at the L0s of the SAEs.

# %%
rows = evaluate(
    store=store,
    saes=output,
    output=f"{output}/evaluation",
    baselines=["pca"],
    max_rows=20_000,
    model_rows=4096,
    feature_rows=20_000,
)
rows

# %% [markdown]
# The rows are dictionaries of about sixty metrics, so pandas takes them as they are.

# %%
table = pd.DataFrame(rows).set_index("name")
table[["l0", "explained_variance", "ce_loss_score", "kl_sae", "top1_agreement", "dead_fraction"]].round(3)

# %% [markdown]
# ## 1. Sparsity against fidelity
#
# Left: how much of the activations' variance is reconstructed. Right: how much of the model's loss is kept when the reconstruction takes the activation's place; 1 is
# the model as it is, 0 is the activation set to zero. Bars are 95% intervals over documents. Up and to the left is better.

# %%
families = {
    "TopK, 2048 latents": "topk-2048",
    "TopK, 512 latents": "topk-512",
    "ReLU + L1": "l1",
    "random directions": "random",
    "principal components": "baseline",
}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for axis, metric in zip(axes, ["explained_variance", "ce_loss_score"], strict=True):
    for family, start in families.items():
        points = table[table.index.str.startswith(start)].sort_values("l0")
        value, interval = points[metric].to_numpy(), np.array([each[metric] for each in points["confidence_95"]])
        errors = [value - interval[:, 0], interval[:, 1] - value]
        axis.errorbar(points["l0"], value, errors, marker="o", ms=5, capsize=3, lw=1.2, label=family)
    axis.set(xscale="log", xlabel="L0: active latents per token", title=metric.replace("_", " "))
    axis.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
    axis.minorticks_off()
axes[1].legend(frameon=False, fontsize=9)
plt.show()


# %%
pca = table.index[table.index.str.startswith("baseline-pca")][-1]
table.loc[["topk-2048-k32", "random-k32", pca], ["l0", "explained_variance", "ce_loss_score"]].round(3)

# %% [markdown]
# Two things to take from this. At the same L0, learnt directions reconstruct far more than random or orthogonal ones: that is what "sparse in some dictionary" means. And a CE score
# flatters everyone. Random directions reconstruct less than half of the variance and still score above 0.7, because zero ablation is a very weak opponent. Judge a CE score by its
# distance from the baselines, not from 0.
#
# ## 2. What the loss that is left costs
#
# A CE score hides how much is lost per token. In nats, over the loss of the model itself:

# %%
lost = (table["ce_sae"] - table["ce_clean"]).sort_values()
axis = lost.plot.barh(figsize=(7, 3.6), color=["C1" if name.startswith("baseline") else "C0" for name in lost.index])
axis.set(xlabel=f"nats per token lost (the model's own loss is {table.ce_clean.iloc[0]:.2f})", ylabel="", xscale="log")
plt.show()

# %% [markdown]
# ## 3. Was it trained long enough?
#
# `metrics.jsonl` in each SAE's folder has the curves. One that still climbs at its end wants more tokens: `train` with larger `tokens` continues the run.

# %%
figure, axis = plt.subplots(figsize=(6, 3.4))
for folder in folders:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    axis.plot(
        [line["tokens"] for line in lines], [line["explained_variance"] for line in lines], lw=1, label=folder.name
    )
axis.set(xlabel="tokens", ylabel="explained variance of the batch", ylim=(0, 1))
axis.legend(frameon=False, fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# ## 4. Are all latents used?
#
# How often each latent fires, on a logarithmic scale. A latent that never fires is dead, and one that fires on every other token is hardly a feature.

# %%
figure, axis = plt.subplots(figsize=(6, 3))
for name in ("topk-2048-k8", "topk-2048-k32", "l1-2.0", "random-k32"):
    histogram = table.density_histogram[name]
    axis.stairs(histogram["counts"], histogram["edges"], label=f"{name}: {table.dead_fraction[name]:.1%} dead", lw=1.5)
axis.set(xlabel="log10 of the share of tokens", ylabel="latents", xlim=(-5, 0))
axis.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## 5. What do more latents buy?
#
# If the wide SAE only had finer versions of the narrow one's latents, every one of its directions would have a parent there. `dictionaries.parquet` compares decoder
# directions of each pair; two match at a cosine of 0.7.

# %%
pairs = pd.DataFrame(pq.read_table(f"{output}/evaluation/dictionaries.parquet").to_pylist())
widths = pairs[pairs["kind"] == "widths"]
widths[["a", "b", "shared", "children_per_parent", "split_parents", "novel"]].round(2)

# %% [markdown]
# `novel` is the share of the wide SAE's latents that match nothing in the narrow one.
#
# ## The choice, and the report
#
# Take the smallest L0 whose loss you can afford, and at that L0 the width that still improves both plots without dying. The next notebooks take a TopK SAE with 2048
# latents at k = 32. All of this, sortable and with a page for each latent, is in one file that needs no server:

# %%
print(f"open {output}/evaluation/report.html")

# %% [markdown]
# ![The report of a sweep](../../docs/images/report-overview.png)
#
# More: [what each metric can and cannot say](../../docs/metrics.md), [how each is computed](../../docs/evaluation.md), [the report](../../docs/report.md),
# [architectures](../../docs/architectures/README.md). Next: [one latent, from Python](3_latent.ipynb).
