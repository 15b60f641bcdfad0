# %% [markdown]
# # 6. A circuit: how does the model know that this ` in` belongs to a `for`?
#
# Notebook [3](3_latent.ipynb) found a latent for the ` in` that is a keyword, and notebook [4](4_steering.ipynb) showed that the model uses it. But at the word ` in` itself there is nothing
# to see: the `for` stands two tokens before. This notebook follows the prediction ` range` back through the layers with an attribution graph, and checks the graph by ablation.
#
# It takes about a minute and a half on two CPU cores.

# %%
import contextlib
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from thresher import SaeModel, evaluate, graph, harvest, train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
run = "runs/notebooks/circuit"

# %% [markdown]
# ## Transcoders
#
# A graph needs a *transcoder* of each MLP: it reads what the MLP reads and writes what the MLP writes, through sparse latents. One harvest stores both ends of all four MLPs,
# and one sweep trains the four transcoders from it.

# %%
places = [f"blocks.{layer}.mlp_{side}" for layer in range(4) for side in ("in", "out")]
harvest(model="stdlib-lm", hook_points=places, tokens=400_000, store=f"{run}/store")
transcoders = train(
    store=f"{run}/store",
    output=f"{run}/saes",
    sae=[
        {
            "name": f"layer-{layer}",
            "reads": f"blocks.{layer}.mlp_in",
            "writes": f"blocks.{layer}.mlp_out",
            "skip": True,
            "d_sae": 1024,
            "k": 16,
        }
        for layer in range(4)
    ],
    batch_size=2048,
)
rows = evaluate(
    store=f"{run}/store",
    saes=f"{run}/saes",
    output=f"{run}/evaluation",
    max_rows=20_000,
    model_rows=4096,
    feature_rows=0,
)
pd.DataFrame(rows).set_index("name")[["explained_variance", "l0", "ce_loss_score", "dead_fraction"]].round(3)

# %% [markdown]
# ## The prediction

# %%
lm = SaeModel.open("stdlib-lm")
texts = ["    for i in", "    if i in"]
for text in texts:
    probabilities, tokens = lm.run(text).logits[0, -1].softmax(-1).topk(5)
    print(
        repr(text), {lm.tokenizer.decode([t]): round(float(p), 3) for t, p in zip(tokens, probabilities, strict=True)}
    )

# %% [markdown]
# ## The graph
#
# With transcoders in place of the MLPs, and attention patterns and norm scales held as they were, everything between latents is linear. So what each token, latent and error adds
# to each later latent and to the logits can be computed exactly. `graph` does that, keeps what matters, and checks the strongest edges: it sets their latent to zero and measures.

# %%
graphs = {}
for number, text in enumerate(texts):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every edge that it checks
        graphs[text] = graph(
            model="stdlib-lm", transcoders=list(transcoders), text=text, verify=40, output=f"{run}/graph-{number}"
        )
found = graphs[texts[0]]
pd.Series(found.summary(), dtype=object)[["active_latents", "kept_nodes", "kept_edges", "replacement_score", "gap"]]

# %% [markdown]
# The *replacement score* is the share of the influence that comes from tokens, and not from what the transcoders miss: the part of the story that the graph can tell. The *gap* says
# that effects add up to what the model computes.
#
# ## Which tokens speak for ` range`?
#
# The total effect of each token's embedding on the logit ` range`, over all paths through latents, and beside it the same for `if i in`, where only one token differs.

# %%
(word,) = lm.tokenizer.encode(" range", add_special_tokens=False)
effects = {}
for text, each in graphs.items():
    target = next(n for n, node in enumerate(each.nodes) if node.kind == "logit" and node.number == word)
    sources = [n for n, node in enumerate(each.nodes) if node.kind == "embedding"]
    effects[text] = [float(each.total_effects(source)[target]) for source in sources]

figure, axis = plt.subplots(figsize=(6, 3))
for number, (text, values) in enumerate(effects.items()):
    axis.bar(np.arange(len(values)) + 0.4 * number - 0.2, values, 0.4, label=repr(text))
tokens = [[repr(lm.tokenizer.decode([token])) for token in graphs[text].tokens] for text in texts]
labels = [a if a == b else f"{a} or {b}" for a, b in zip(*tokens, strict=True)]
axis.set_xticks(range(len(labels)), labels, family="monospace", fontsize=9)
axis.axhline(0, color="gray", lw=0.8)
axis.set(ylabel="total effect on the logit ' range'")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The word ` in` and the variable speak for ` range` in both texts, and nearly as much. What is different is the token that differs: ` for` adds what ` if` does not.
#
# ## Through which latents?
#
# The kept part of the graph: tokens at the bottom, logits at the top, latents between, the strongest edges drawn. Blue adds, red takes away.

# %%
content = json.loads(Path(f"{run}/graph-0/graph.json").read_text())
kept = [n for n in range(len(found.nodes)) if found.pruned.nodes[n] and found.nodes[n].kind != "error"]
place, taken = {}, {}
for n in kept:
    node = found.nodes[n]
    if node.kind == "logit" and node.number != word:
        continue
    column = taken.setdefault((node.layer, node.position), [])
    place[n] = (node.position + 0.11 * len(column) - 0.3, node.layer)
    column.append(n)
edges = found.pruned.edges.tocoo()
drawn = sorted(
    ((abs(w), w, a, b) for w, a, b in zip(edges.data, edges.col, edges.row, strict=True) if a in place and b in place),
    reverse=True,
)[:70]

figure, axis = plt.subplots(figsize=(10, 5))
for size, weight, source, target in drawn:
    (x0, y0), (x1, y1) = place[source], place[target]
    axis.plot([x0, x1], [y0, y1], color="C0" if weight > 0 else "C3", lw=2 * size / drawn[0][0] + 0.2, alpha=0.5)
for n, (x, y) in place.items():
    axis.plot(x, y, "s" if found.nodes[n].kind != "latent" else "o", color="black", ms=5)
axis.set_xticks(range(len(found.tokens)), tokens[0], family="monospace")
axis.set_yticks(range(-1, 5), ["token", "layer 0", "layer 1", "layer 2", "layer 3", "' range'"])
plt.show()

# %% [markdown]
# All kept latents stand at ` in`. Attention carries ` for` and the variable there, and latents of layers 1 to 3 read them together.
#
# The latents that add most to the logit through all paths, with the tokens that each promotes by itself:

# %%
target = next(n for n, node in enumerate(found.nodes) if node.kind == "logit" and node.number == word)
lines = []
for n in kept:
    node = found.nodes[n]
    if node.kind == "latent":
        name = next(
            (
                node_["clerp"]
                for node_ in content["nodes"]
                if node_["node_id"] == f"{node.layer}_{node.number}_{node.position}"
            ),
            "",
        )
        lines.append(
            {
                "layer": node.layer,
                "latent": node.number,
                "at": tokens[0][node.position],
                "effect": float(found.total_effects(n)[target]),
                "": name,
            }
        )
pd.set_option("display.max_colwidth", 80)
pd.DataFrame(lines).sort_values("effect", key=abs, ascending=False).head(8).set_index(["layer", "latent"]).round(3)

# %% [markdown]
# ## Is it true?
#
# A graph is a claim. `verify` has set the latent of each of the forty strongest edges to zero and measured what happens to the edge's target: with attention patterns and norms
# held, which is what the graph assumes, and in the model as it is.

# %%
checked = pd.concat(
    [pd.read_parquet(f"{run}/graph-{number}/verified.parquet") for number in range(2)], ignore_index=True
)
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True)
for axis, (column, title) in zip(
    axes, [("total_frozen", "patterns and norms held"), ("total_measured", "in the model as it is")], strict=True
):
    correlation = checked["total"].corr(checked[column])
    axis.plot(checked["total"], checked[column], "o", ms=4, alpha=0.6)
    axis.axline((0, 0), slope=1, color="gray", lw=0.8, ls=":")
    axis.set(xlabel="predicted by the graph", title=f"{title}: r = {correlation:.2f}")
axes[0].set_ylabel("measured without the latent")
plt.show()

# %% [markdown]
# Where the graph's assumptions are enforced it predicts what happens well, and in the model as it is less well: without a latent, attention and norms adjust. A graph is a good way to
# find candidates, and an ablation in the real model is the test.
#
# `graph.html` in the run's folder shows the same with every node and edge to click on, and `graph.json` opens in the viewers of circuit-tracer and Neuronpedia. More:
# [attribution graphs](../../docs/circuits.md), [transcoders](../../docs/architectures/transcoder.md). Next: [your own model and activations](7_own_activations.ipynb).
