# %% [markdown]
# # 5. Explain latents in words, and score the words
#
# Reading thousands of cards is not possible, so something else has to say what each latent fires on. `explain` does so without a language model: it searches short rules over
# tokens ("fires on ` in` after ` for`"), and then measures on documents that it never saw how well the rule predicts the latent. This notebook explains two hundred latents,
# shows how far to trust the words, and puts the best explanations to a harder test: does a latent that is explained well also *do* what the words say?
#
# It takes a minute and a half on two CPU cores, and as long again if notebook [3](3_latent.ipynb) has not been run.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from thresher import FeatureIndex, evaluate, explain, harvest, show, train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.max_colwidth", 120)
hook_point = "blocks.2.resid_post"
run = Path("runs/notebooks")

# %%
harvest(model="stdlib-lm", hook_points=[hook_point], tokens=500_000, store=run / "store")
train(
    store=run / "store",
    output=run / "saes",
    sae=[{"name": "topk-k32", "hook_point": hook_point, "d_sae": 2048, "k": 32}],
    batch_size=2048,
    epochs=3.0,
)
if not (run / "evaluation" / "report.html").exists():
    evaluate(
        store=run / "store",
        saes=run / "saes",
        output=run / "evaluation",
        max_rows=20_000,
        model_rows=4096,
        feature_rows=262_144,
    )

# %% [markdown]
# ## Which latents
#
# Two hundred at random of those that fire, and all whose strongest contexts have their peak on ` in`, the word of the notebooks before.

# %%
index = FeatureIndex.open(run / "evaluation" / "features" / "topk-k32.parquet")
peaks = {
    latent["latent"]: {index.texts.alone(context["tokens"][context["peak"]]) for context in latent["top"]}
    for batch in index.batches()
    for latent in batch
    if latent["firings"] > 20
}
of_in = [latent for latent, tokens in peaks.items() if tokens == {" in"}]
chosen = sorted({*of_in, *np.random.default_rng(0).choice(list(peaks), 200, replace=False).tolist()})
print(f"{len(peaks)} latents fire, {of_in} on ' in'")

# %% [markdown]
# ## Explain
#
# Rules are searched on training documents and scored on held-out ones. `causal=True` also steers thirty latents in the model, for the last section.

# %%
written = explain(
    evaluation=run / "evaluation",
    latents=chosen,
    explain_rows=131_072,
    score_rows=65_536,
    causal=True,
    causal_latents=30,
    causal_prompts=16,
)
table = pq.read_table(written["topk-k32"]).to_pandas()
rules = table[table["explainer"] == "rules"].set_index("latent")
rules.loc[of_in, ["explanation", "detection", "precision", "recall"]].round(2)

# %% [markdown]
# Notebook [3](3_latent.ipynb) asked what these three mean with Python's parser at hand. The words come close for the first, and the second shows the limit: a rule that must say
# "keyword" lists the lines on which keywords stand.
#
# `precision` and `recall` are exact, per token, over all held-out rows. `detection` is the usual score: balanced accuracy in telling 32-token windows with the latent from
# windows without it, where a coin scores 0.5.
#
# ## How good are they?
#
# Two baselines say what a score is worth: the tokens on which the latent fires most often, and the rule of another latent.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
bins = np.linspace(0.4, 1, 31)
for explainer, colour in (("random latent", "0.7"), ("token frequency", "C1"), ("rules", "C0")):
    scores = table.loc[table["explainer"] == explainer, "detection"].dropna()
    label = f"{explainer}: mean {scores.mean():.2f}"
    axes[0].hist(scores, bins, histtype="stepfilled", alpha=0.55, color=colour, label=label)
axes[0].set(xlabel="detection", ylabel="latents")
axes[0].legend(frameon=False, fontsize=9)
axes[1].plot(rules["recall"], rules["precision"], "o", ms=4, alpha=0.6)
axes[1].plot(rules.loc[of_in, "recall"], rules.loc[of_in, "precision"], "o", ms=7, color="C3", label="latents of ' in'")
axes[1].set(xlabel="recall of the rule, per token", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Rules beat token frequency by some way, and per token they still catch only part of what fires. A window of 32 tokens forgives a rule much, which is worth remembering
# when detection is the only score that a paper reports.
#
# ## The best and the worst

# %%
measured = rules[rules["n_active"] >= 25].sort_values("balanced_accuracy")
measured[["explanation", "detection", "balanced_accuracy"]].round(2).iloc[[-1, -2, -3, -4, -5]]

# %%
measured.assign(explanation=measured["explanation"].str.slice(0, 110))[
    ["explanation", "detection", "balanced_accuracy"]
].round(2).head(3)

# %% [markdown]
# The worst one's card says why: no short rule over tokens, and perhaps no person, can say what these contexts share.

# %%
show("topk-k32", int(measured.index[0]), run / "evaluation", n_contexts=5)

# %% [markdown]
# ## Explained well, and does it do it?
#
# The causal score turns the question round. The latent is steered while the model writes, and the rule is counted on the new text, minus the count when another latent is
# steered by a vector of the same length. Zero means that the latent does not make the model write what the words say.

# %%
steered = rules.dropna(subset=["causal"])
error = [steered["causal"] - steered["causal_low"], steered["causal_high"] - steered["causal"]]
figure, axis = plt.subplots(figsize=(6, 3.6))
axis.axhline(0, color="gray", lw=0.8, ls=":")
axis.errorbar(steered["balanced_accuracy"], steered["causal"], error, fmt="o", ms=4, lw=0.8, alpha=0.8)
for latent, row in steered.nlargest(2, "causal").iterrows():
    axis.annotate(
        latent, (row["balanced_accuracy"], row["causal"]), textcoords="offset points", xytext=(6, 2), fontsize=9
    )
axis.set(xlabel="balanced accuracy of the rule, per token", ylabel="causal score")
plt.show()
above = (steered["causal_low"] > 0).sum()
print(f"{above} of {len(steered)} latents have a causal score whose interval is above zero")

# %%
steered.sort_values("causal")[["explanation", "balanced_accuracy", "causal"]].round(2).iloc[[-1, -2, 0]]

# %% [markdown]
# A rule that predicts well is needed, and not enough. In the run shown here the latents that write what the words say have good rules, and beside them stand others, explained just
# as well, that do nothing of the kind: they read, and steering them does not make the model write what they read. That is no fault of the explanation. It is another question, and
# the answer cannot be guessed from the first.
#
# ## With a language model
#
# A model behind any OpenAI-compatible endpoint can explain and judge as well, with an estimate first, a hard budget and a cache (not run here):
#
# ```python
# explain(
#     evaluation="runs/notebooks/evaluation",
#     llm={"base_url": "http://127.0.0.1:8000/v1", "model": "my-model", "max_latents": 50, "max_cost": 2.0},
# )
# ```
#
# More: [explanations](../../docs/explanations.md), with the grammar of rules and the definition of every score. Next: [through which latents is a prediction
# made](6_circuit.ipynb)?
