# %% [markdown]
# # 1. Harvest activations, and look at them
#
# An SAE is trained on millions of activations of a language model. Thresher runs the model **once** and keeps the activations in a store on disk. This notebook harvests
# a small store, reads it, and asks three questions that are worth asking of any model before an SAE is trained on it: how large are the activations, how many directions
# do they fill, and how alike are neighbours?
#
# The model, `stdlib-lm`, comes with Thresher: four blocks, 256 wide, trained on Python source. The text is this Python's own standard library. Nothing is downloaded, and
# the notebook takes less than a minute on a CPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from thresher import ActivationStore, SaeModel, ShuffledBatches, harvest

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Harvest
#
# One forward pass per context fills the store with the residual stream after each of the four blocks. Run this cell again and it returns at once: a finished store is
# reused, and one that was interrupted is resumed.

# %%
hook_points = [f"blocks.{layer}.resid_post" for layer in range(4)]
harvest(model="stdlib-lm", hook_points=hook_points, tokens=131_072, store="runs/notebooks/blocks")
store = ActivationStore.open("runs/notebooks/blocks")
store

# %% [markdown]
# ## Rows
#
# A row is one token's activation at a hook point. Rows are in the order of the text, and the store knows each one's token, document and position.

# %%
lm = SaeModel.open("stdlib-lm")  # here only for its tokenizer
start, stop = 100, 112
rows = store.read("blocks.2.resid_post", start, stop)
documents, positions = store.documents(start, stop)
print(f"{rows.shape} {rows.dtype}, from {store.document_info(int(documents[0]))[1]}")
for token, position, row in zip(store.tokens(start, stop).tolist(), positions, rows.float(), strict=True):
    print(f"{position:6}  {lm.tokenizer.decode([token])!r:12} norm {row.norm():6.1f}")

# %% [markdown]
# ## How large are they?
#
# The first token of every context is a BOS, which is no text. Its norm says why such rows are masked: neither trained on nor evaluated.

# %%
n = 50_000
usable = store.row_mask(0, n)
x = {hook_point: store.read(hook_point, 0, n).float() for hook_point in hook_points}

figure, axes = plt.subplots(1, 4, figsize=(12, 2.6), sharey=True)
for axis, hook_point in zip(axes, hook_points, strict=True):
    norms = x[hook_point].norm(dim=1).numpy()
    bins = np.linspace(0, norms.max(), 60)
    axis.hist(norms[usable], bins, label="text")
    axis.hist(norms[~usable], bins, label="BOS", color="C3")
    axis.set(yscale="log", title=hook_point, xlabel="norm")
axes[0].set_ylabel("rows")
axes[0].legend(frameon=False)
plt.show()

# %%
for hook_point in hook_points:
    norms = x[hook_point].norm(dim=1)
    text, bos = norms[usable].median(), norms[~usable].median()
    share = norms[~usable].square().sum() / norms.square().sum()
    print(
        f"{hook_point}: text {text:6.1f}, BOS {bos:7.1f}; BOS is {(~usable).mean():.1%} of rows and {share:.0%} of the squares"
    )

# %% [markdown]
# The model parks something at the BOS: up to block 2 its norm grows to several times that of text, so that one row in 256 would have a say like a dozen. An SAE trained on it
# would spend its first latents there.
#
# ## How many directions do they fill?
#
# An SAE writes each row as a sum of a few directions out of thousands. Principal components are the plainest alternative: a fixed set of orthogonal directions. If a few
# dozen components carried nearly everything, an SAE would have little to find.

# %%
figure, axis = plt.subplots(figsize=(6, 3.4))
directions = {}
for hook_point in hook_points:
    text = x[hook_point][usable].double()
    variances = torch.linalg.eigvalsh(torch.cov(text.T)).flip(0)
    explained = (variances.cumsum(0) / variances.sum()).numpy()
    directions[hook_point] = int(np.searchsorted(explained, 0.9)) + 1
    axis.plot(np.arange(1, 257), explained, label=f"{hook_point}: 90% at {directions[hook_point]}")
axis.axhline(0.9, color="gray", lw=0.8, ls=":")
axis.set(xlabel="principal components", ylabel="share of the variance", xlim=(0, 256), ylim=(0, 1))
axis.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# They do not. The deeper the block, the more directions the same share takes, up to more than half of all there are: the activations are spread out, and yet
# [an SAE](2_sweep.ipynb) will write each of them with a few dozen latents.
#
# ## How alike are neighbours?
#
# Rows of one file are alike, and close neighbours most of all. A batch of consecutive rows would show an SAE one file at a time, so training reads shuffled batches.
# The plot measures it: the mean cosine of two rows, less the store's mean row, at growing distances in the text, and the same for two rows of a shuffled batch.

# %%
hook_point = "blocks.2.resid_post"
centred = x[hook_point] - x[hook_point][usable].mean(0)
unit = centred / centred.norm(dim=1, keepdim=True)
documents, _ = store.documents(0, n)
distances = np.unique(np.geomspace(1, 2000, 24).astype(int))
cosines = []
for distance in distances:
    same = usable[:-distance] & usable[distance:] & (documents[:-distance] == documents[distance:])
    cosines.append(float((unit[:-distance][same] * unit[distance:][same]).sum(1).mean()))

(batch,) = ShuffledBatches(store, [hook_point], batch_size=4096, n_rows=4096)
shuffled = batch[hook_point].float() - x[hook_point][usable].mean(0)
shuffled /= shuffled.norm(dim=1, keepdim=True)
in_batch = float((shuffled[:-1] * shuffled[1:]).sum(1).mean())

figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(distances, cosines, "o-", ms=4, label="in the order of the text")
axis.axhline(in_batch, color="C1", label="in a shuffled batch")
axis.set(xscale="log", xlabel="distance in tokens", ylabel="mean cosine")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What it costs
#
# Compression is lossless here; `codec="int8"` halves it again with an error far below that of any SAE.

# %%
n_bytes = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
print(f"{n_bytes / store.n_rows / len(hook_points):.0f} bytes per row and hook point, of {2 * 256} uncompressed")

# %% [markdown]
# Next: [train a sweep of SAEs on a store, and read its report](2_sweep.ipynb). More: text of your own, larger models and object storage are in the guides on
# [text](../../docs/text.md), [harvesting](../../docs/harvesting.md) and [object stores](../../docs/object-stores.md).
