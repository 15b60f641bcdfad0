# %% [markdown]
# # 3. One latent, from Python: what does ` in` mean?
#
# A report lists thousands of latents. This notebook goes the other way, from a question to the latents that answer it. In Python source the word ` in` means three things:
# a loop (`for x in xs`), a test of membership (`if x in xs`), and a preposition in comments and docstrings. Does the model tell them apart, and if it does, has the SAE
# a latent for each?
#
# It takes a minute and a half the first time, on two CPU cores. The store, the SAE and its evaluation are kept for the next notebooks.

# %%
import ast
import io
import sysconfig
import tokenize
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from thresher import ActivationStore, FeatureIndex, Sae, SaeModel, evaluate, harvest, show, train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
hook_point = "blocks.2.resid_post"
run = Path("runs/notebooks")

# %% [markdown]
# ## A store, an SAE and its feature index
#
# If you have run `thresher demo`, you have all of this already: set `run = Path("runs/demo")` and skip the next cell.

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

# %%
store = ActivationStore.open(run / "store")
sae = Sae.load(run / "saes" / "topk-k32")
sae

# %% [markdown]
# ## Every ` in` of the text, and what it means
#
# First the question without the SAE. The store knows the file and the position of every token, and Python's own parser knows what each `in` is: the one of a `for`, or
# a comparison. An ` in` that is no keyword is in a comment or a string, and therefore a preposition.

# %%
lm = SaeModel.open("stdlib-lm", [sae])
tokenizer = lm.tokenizer
(word,) = tokenizer.encode(" in", add_special_tokens=False)


def keywords(source):
    """Return the meaning of each keyword `in` by its line and column."""
    with warnings.catch_warnings(action="ignore"):  # some of the files have invalid escapes in strings
        tree = ast.parse(source)
    spans = [
        ((node.target.end_lineno, node.target.end_col_offset), (node.iter.lineno, node.iter.col_offset))
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)
    ]
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string == "in":
            found[token.start] = "loop" if any(a <= token.start <= b for a, b in spans) else "membership"
    return found


def meanings(source):
    """Return the meaning of each token ` in` of a file, by its number in the file."""
    by_place, lines = keywords(source), np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    encoded = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = {}
    for number, (token, (begin, _)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        if token == word:
            line = np.searchsorted(lines, begin + 1, side="right")
            found[number] = by_place.get((int(line), int(begin + 1 - lines[line - 1])), "preposition")
    return found


# %%
library = Path(sysconfig.get_paths()["stdlib"])
documents, positions = store.documents(0, store.n_rows)
held_out = np.repeat(store.held_out_contexts(), store.context_size)
rows = np.flatnonzero(store.tokens(0, store.n_rows).numpy() == word)
of_file = {}
for document in np.unique(documents[rows]):
    try:
        of_file[document] = meanings((library / store.document_info(int(document))[1]).read_text())
    except (SyntaxError, ValueError):  # files that test what Python refuses
        of_file[document] = {}
kinds = np.array([of_file[documents[row]].get(positions[row] - 1, "?") for row in rows])
rows, kinds = rows[kinds != "?"], kinds[kinds != "?"]
order = ["loop", "membership", "preposition"]
pd.DataFrame({"documents": np.where(held_out[rows], "held out", "training"), "meaning": kinds}).value_counts().unstack(
    0
).loc[order]

# %% [markdown]
# ## A latent for each?
#
# For each meaning, take the latent whose firing on ` in` tells it best from the other two, on training documents. Beside them, take the latents that are *of the word*: most of the
# contexts in which they are strongest have their peak on ` in`. Then look at all of them on documents that neither the SAE nor this choice has seen.

# %%
block = 65_536
fires = []
for start in range(0, store.n_rows, block):
    stop = min(start + block, store.n_rows)
    here = rows[(rows >= start) & (rows < stop)] - start
    fires.append(sae.encode(store.read(hook_point, start, stop)[here].float()) > 0)
fires = torch.cat(fires).numpy()  # [occurrences, latents]

chosen = {}
for kind in order:
    yes, no = fires[(kinds == kind) & ~held_out[rows]], fires[(kinds != kind) & ~held_out[rows]]
    chosen[kind] = int((yes.mean(0) - no.mean(0)).argmax())

index = FeatureIndex.open(run / "evaluation" / "features" / "topk-k32.parquet")
of_word = []
for latent in (latent for batch in index.batches() for latent in batch):
    peaks = [context["tokens"][context["peak"]] for context in latent["top"]]
    if len(peaks) >= 8 and peaks.count(word) >= 0.7 * len(peaks):
        of_word.append(latent["latent"])

# %%
columns = list(dict.fromkeys([*of_word, *chosen.values()]))
share = np.array([[fires[(kinds == kind) & held_out[rows], latent].mean() for latent in columns] for kind in order])
names = {latent: "of the word" for latent in of_word} | {latent: f"best for {kind}" for kind, latent in chosen.items()}

figure, axis = plt.subplots(figsize=(1.5 * len(columns) + 2, 3))
axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (i, j), value in np.ndenumerate(share):
    axis.text(j, i, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.5 else "black")
labels = [f"{each}\n{names[each]}\n{index.latent(each)['density']:.1%} of tokens" for each in columns]
axis.set_xticks(range(len(columns)), labels, fontsize=8)
axis.set_yticks(range(3), [f"{kind} (n = {((kinds == kind) & held_out[rows]).sum()})" for kind in order])
axis.set_title("how often a latent fires on ' in', in held-out files")
plt.show()

# %% [markdown]
# So the model does keep the three apart, and it does so on files that nobody trained on. But not with a latent per meaning. In the run shown here there are latents *of the word*:
# one fires on every ` in`, one on nearly every ` in` that is a keyword. And there are latents *of the surroundings*, which fire on many other tokens, too: in the head of a
# loop, in a condition, in English prose. What this ` in` means is said by both together. A search for "the latent of the loop's `in`" would have found the first kind, and missed
# how the model says the rest.
#
# ## Cards
#
# `show` draws what the evaluation knows of a latent: where in the text it is strongest, with every token coloured by its activation, and the tokens whose logits its
# decoder direction raises and lowers. First the word's own latent that prefers keywords, then the latents that are best for loops and for prose.

# %%
keyword = max(of_word or columns, key=lambda latent: share[0, columns.index(latent)] - share[2, columns.index(latent)])
show("topk-k32", keyword, run / "evaluation", n_contexts=4)

# %%
show("topk-k32", chosen["loop"], run / "evaluation", n_contexts=4)

# %%
show("topk-k32", chosen["preposition"], run / "evaluation", n_contexts=4)

# %% [markdown]
# Look at *promotes*: latents are not only labels of what was read, they say what comes next. After a loop's variable comes ` in`, and after its ` in` often ` range`.
#
# ## Text of your own
#
# `SaeModel` runs the model with the SAE in it. Each row of the picture is one of these latents, over the tokens of a text that is in no file.

# %%
text = """# keep the colours that are in the palette
for colour in colours:
    if colour in palette:
        kept.append(colour)"""
found = lm.run(text)
activations = found.latents[hook_point].to_dense()[0, 1:, columns].T
labels = [tokenizer.decode([token]).replace("\n", "↵") for token in found.tokens[0, 1:].tolist()]

figure, axis = plt.subplots(figsize=(12, 2.2))
axis.imshow(activations.numpy(), cmap="Blues", aspect="auto")
axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8, family="monospace")
axis.set_yticks(range(len(columns)), [f"{latent}, {names[latent]}" for latent in columns])
plt.show()

# %% [markdown]
# ## Searching without a question
#
# The index is a table with a row per latent, so any column can be searched. `interestingness` is a guide to where to begin: latents that are rare, that fire in many
# documents, and whose contexts agree.

# %%
table = index.columns(["latent", "density", "max_activation", "interestingness", "promoted"]).to_pandas()
best = table.nlargest(8, "interestingness").set_index("latent")
best["promoted"] = [" ".join(repr(index.texts.alone(each["token"])) for each in some[:5]) for some in best["promoted"]]
best.round(3)

# %% [markdown]
# Next: [what happens if such a latent is switched off, or on](4_steering.ipynb). To browse latents in a page, open `evaluation/report.html` in the run's folder, or start
# the [microscope](../../docs/microscope.md).
