# %% [markdown]
# # 4. Steer and ablate: from "it fires" to "it causes"
#
# A latent that fires on loops may be a bystander. Whether the model *uses* it is a question for an intervention: switch it off and see what changes. This notebook
# finds the latents behind one prediction, confirms each by ablation, exchanges two of them, measures how much steering costs, and shows latents that tell texts apart
# perfectly and do nothing.
#
# It takes about a minute on two CPU cores, and half a minute more if the [notebook before](3_latent.ipynb) has not been run.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from thresher import (
    Ablate,
    ActivationStore,
    Clamp,
    LogitDifference,
    SaeModel,
    contrast,
    harvest,
    steering_curve,
    train,
)

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
hook_point = "blocks.2.resid_post"

# %% [markdown]
# ## A model with an SAE in it

# %%
harvest(model="stdlib-lm", hook_points=[hook_point], tokens=500_000, store="runs/notebooks/store")
(folder,) = train(
    store="runs/notebooks/store",
    output="runs/notebooks/saes",
    sae=[{"name": "topk-k32", "hook_point": hook_point, "d_sae": 2048, "k": 32}],
    batch_size=2048,
    epochs=3.0,
)
lm = SaeModel.open("stdlib-lm", [folder])
loop, comment = "for i in", "# the last item in"


def next_tokens(text, n=6):
    probabilities, tokens = lm.run(text).logits[0, -1].softmax(-1).topk(n)
    return {
        repr(lm.tokenizer.decode([token])): round(float(p), 3) for token, p in zip(tokens, probabilities, strict=True)
    }


print(loop, next_tokens(loop))
print(comment, next_tokens(comment))

# %% [markdown]
# The same word, and the model expects something else. Which latents decide it?
#
# ## Attribute, then ablate
#
# `attribute` estimates from gradients what each active latent adds to a difference of two logits: here ` range` minus ` the`. `ablate` measures it, with a pass of the model
# for each latent. The estimate costs 64 passes whatever the number of latents, so it is what one uses on a large model; here both are cheap, and can be compared.

# %%
metric = LogitDifference(" range", " the")
clean = lm.run([loop, comment])
estimated = lm.attribute(clean, metric, "integrated_gradients").latents[hook_point].to_dense()
measured = lm.ablate(clean, metric).latents[hook_point].to_dense()
active = clean.latents[hook_point].to_dense() > 0

figure, axis = plt.subplots(figsize=(4.4, 4.2))
for number, text in enumerate((loop, comment)):
    axis.plot(
        measured[number][active[number]], estimated[number][active[number]], "o", ms=4, alpha=0.6, label=repr(text)
    )
    for position, latent in (measured[number].abs() > 0.8).nonzero().tolist():
        axis.annotate(latent, (measured[number, position, latent], estimated[number, position, latent]), fontsize=8)
axis.axline((0, 0), slope=1, color="gray", lw=0.8, ls=":")
axis.set(
    xlabel="measured by ablation", ylabel="estimated from gradients", title="effect on logit( range) - logit( the)"
)
axis.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Each dot is a latent at a token. The estimate is nearly exact here. Most latents do next to nothing and a handful decide, some of them against the prediction: in the run shown
# here, one of the strongest *lowers* ` range` after `for i in`. It is the latent of the word ` in` whatever it means, and another, of ` in` as a keyword, makes up for it
# (notebook [3](3_latent.ipynb) has both). The strongest at the word ` in` of each text:

# %%
last = (clean.lengths - 1).tolist()
of_loop, of_comment = int(measured[0, last[0]].argmax()), int(measured[1, last[1]].argmin())
print(f"for {loop!r}, latent {of_loop}: without it the difference falls by {measured[0, last[0], of_loop]:.2f}")
print(
    f"for {comment!r}, latent {of_comment}: without it the difference rises by {-measured[1, last[1], of_comment]:.2f}"
)

# %% [markdown]
# ## Exchange them
#
# If these two carry the meaning of the word, exchanging them should exchange what the model expects. In each text the latent that belongs there is switched off at the last
# token, and the other one is switched on, as strongly as it is in its own text.

# %%
latents = clean.latents[hook_point].to_dense()
strength = {of_loop: float(latents[0, last[0], of_loop]), of_comment: float(latents[1, last[1], of_comment])}


def exchanged(off, on):
    return lm.steer({(hook_point, off): Ablate(where=-1), (hook_point, on): Clamp(strength[on], where=-1)})


figure, axes = plt.subplots(1, 2, figsize=(11, 3))
for axis, (text, off, on) in zip(axes, [(loop, of_loop, of_comment), (comment, of_comment, of_loop)], strict=True):
    before = next_tokens(text)
    with exchanged(off, on):
        after = next_tokens(text)
    both = list(dict.fromkeys([*before, *after]))[:10]
    place = np.arange(len(both))
    axis.bar(place - 0.2, [before.get(token, 0) for token in both], 0.4, label="as it is")
    axis.bar(place + 0.2, [after.get(token, 0) for token in both], 0.4, label=f"{off} off, {on} on")
    axis.set_xticks(place, both, rotation=50, ha="right", family="monospace", fontsize=9)
    axis.set(title=text, ylabel="probability of the next token")
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The exchange works in one direction. Without the latent of the keyword, the loop's ` range` is mostly gone, and the words of prose come up. The comment does not become a loop: its
# latent is one of many that say "prose", and one latent against all of them raises ` range`, but not to the top. Tested in the first direction alone, the story would have been simpler, and wrong.
#
# ## What does steering cost?
#
# A latent that is turned up far enough changes anything, and breaks everything. `steering_curve` draws the trade: the effect is the log-probability of ` range` after
# comments, the damage the KL divergence from the model as it is. Random latents are steered just as strongly, each in multiples of its own largest activation.

# %%
store = ActivationStore.open("runs/notebooks/store")
lm.measure_maxima(store.tokens(0, 64 * store.context_size).view(64, -1).tolist())
prompts = ["# the last item in", "# this is used in", "# defined in", '"""Return the first word in']
strengths = [0.0, 0.5, 1.0, 2.0]
curve = steering_curve(
    lm,
    hook_point,
    of_loop,
    strengths,
    prompts,
    concept=[" range"],
    unit="max",
    where=-1,
    max_new_tokens=2,
    n=1,
    random_latents=5,
)
points = pd.DataFrame(curve.points)

figure, axis = plt.subplots(figsize=(5.4, 3.6))
for latent, line in points.groupby("latent"):
    chosen = latent == of_loop
    axis.plot(
        line["kl"],
        line["effect"],
        "o-" if chosen else "-",
        ms=4,
        color="C0" if chosen else "0.75",
        zorder=2 if chosen else 1,
    )
    if chosen:
        for row in line.itertuples():
            axis.annotate(
                f"{row.strength:g}", (row.kl, row.effect), textcoords="offset points", xytext=(5, -10), fontsize=8
            )
axis.set(
    xlabel="damage: KL in nats per token",
    ylabel="effect: log-probability of ' range'",
    title=f"latent {of_loop}, and random latents in grey",
)
plt.show()

# %% [markdown]
# ## Latents that tell, and latents that do
#
# `contrast` compares two sets of texts. A latent's AUC says how well it tells them apart; its effect is what the model's log-probability of the texts loses without it.

# %%
raises = [
    f"raise {name}("
    for name in [
        "ValueError",
        "TypeError",
        "KeyError",
        "OSError",
        "RuntimeError",
        "IndexError",
        "ImportError",
        "NameError",
    ]
]
returns = [
    f"return {name}" for name in ["self.name", "len(value)", "[x]", "None", "True", "result", "data[0]", "str(x)"]
]
found = pd.DataFrame(contrast(lm, raises, returns, top=40))

perfect = found[(found["auc"] > 0.999) | (found["auc"] < 0.001)].sort_values("effect_a", ascending=False)
figure, axis = plt.subplots(figsize=(7, 3.2))
axis.axhline(0, color="gray", lw=0.8, ls=":")
error = [perfect["effect_a"] - perfect["effect_a_low"], perfect["effect_a_high"] - perfect["effect_a"]]
axis.errorbar(range(len(perfect)), perfect["effect_a"], error, fmt="o", ms=4, lw=0.8)
axis.set_xticks(range(len(perfect)), perfect["latent"], rotation=90, fontsize=7)
axis.set(xlabel="latents with an AUC of 0 or 1", ylabel="nats per token lost without it")
plt.show()

# %%
idle = perfect[(perfect["effect_a_low"] < 0.01) & (perfect["effect_a_high"] > -0.01)]
print(
    f"{len(perfect)} latents tell every raise from every return; {len(idle)} of them have no effect that the texts could show"
)

# %% [markdown]
# Whoever names latents by where they fire would have named all of these. More: [interventions](../../docs/interventions.md), with edits of directions, conditions, and files
# for lm-evaluation-harness. Next: [what do latents fire on, in words](5_explanations.ipynb)?
