# %% [markdown]
# # 7. Your own model, your own activations
#
# Thresher harvests language models of transformers by itself. Anything else needs three lines: a forward hook, an `ActivationStoreWriter`, and `append`. This notebook
# does it with a model that is no language model at all, a small convolutional network that reads letters in many fonts. Its latents turn out to be parts of letters, and the last section asks what
# the network reads when a part is taken away. Activations from vLLM and nnsight are at the end.
#
# It takes less than a minute on two CPU cores.

# %%
import string
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from thresher import ActivationStore, ActivationStoreWriter, Sae, evaluate, train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
run = Path("runs/notebooks/letters")

# %% [markdown]
# ## A data set: letters in the fonts that come with matplotlib
#
# Each letter in each face, at random sizes, angles and places: 24 by 24 pixels.

# %%
letters = string.ascii_letters + string.digits
folder = Path(font_manager.__file__).parent / "mpl-data" / "fonts" / "ttf"
faces = sorted(folder.glob("DejaVu*.ttf")) + sorted(folder.glob("STIXGeneral*.ttf"))
faces = [face for face in faces if "Display" not in face.name]
rng = np.random.default_rng(0)


def draw(letter, face):
    image = Image.new("L", (24, 24))
    font = ImageFont.truetype(str(face), int(rng.integers(15, 21)))
    x, y = rng.uniform(10.5, 13.5, 2)
    ImageDraw.Draw(image).text((x, y), letter, 255, font, anchor="mm")
    return np.asarray(image.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR))


labels = np.tile(np.repeat(np.arange(len(letters)), len(faces)), 12)
images = np.stack([draw(letters[label], faces[number % len(faces)]) for number, label in enumerate(labels)])
shuffle = rng.permutation(len(labels))
images, labels = torch.tensor(images[shuffle])[:, None] / 255, torch.tensor(labels[shuffle])
n_train = len(labels) * 9 // 10

figure, axes = plt.subplots(2, 16, figsize=(12, 1.7))
for axis, image in zip(axes.flat, images, strict=False):
    axis.imshow(image[0].numpy(), cmap="gray_r")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A model of your own: any `nn.Module`

# %%
torch.manual_seed(0)
trunk = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
)
model = nn.Sequential(trunk, nn.Flatten(), nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, len(letters)))
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(4):
    for index in torch.randperm(n_train).split(128):
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
with torch.no_grad():
    correct = model(images[n_train:]).argmax(1) == labels[n_train:]
print(f"{correct.float().mean():.1%} of unseen images are read correctly")

# %% [markdown]
# ## Its activations
#
# The trunk returns 64 channels at 6 by 6 places. An image is a *context* and a place is a *row*, as a text is a context and a token a row. `held_out` marks whole contexts
# for evaluation; they are never trained on. If the process is killed, the same code resumes at `n_committed_contexts`.

# %%
kept = []
handle = trunk.register_forward_hook(lambda module, inputs, output: kept.append(output))
with ActivationStoreWriter(run / "store", {"trunk": 64}, context_size=36, dtype="float32") as writer, torch.no_grad():
    for index in torch.arange(writer.n_committed_contexts, len(images)).split(256):
        model(images[index])
        rows = kept.pop().flatten(2).transpose(1, 2)  # [images, places, channels]
        writer.append({"trunk": rows}, held_out=(index >= n_train).tolist())
handle.remove()
store = ActivationStore.open(run / "store")
store

# %% [markdown]
# ## An SAE, and is it better than the channels?
#
# From here on all is as for a language model. There is no model to splice the SAE into, so `model=False`; `baselines=["neurons"]` compares with the network's own channels at
# the same L0.

# %%
(folder,) = train(
    store=run / "store",
    output=run / "saes",
    sae=[{"name": "topk", "hook_point": "trunk", "d_sae": 512, "k": 8}],
    batch_size=2048,
    epochs=3.0,
)
rows = evaluate(
    store=run / "store",
    saes=run / "saes",
    output=run / "evaluation",
    model=False,
    feature_rows=0,
    baselines=["neurons"],
)
pd.DataFrame(rows).set_index("name")[["d_sae", "l0", "explained_variance", "dead_fraction"]].round(3)

# %% [markdown]
# ## What do latents see?
#
# For some latents, the eight images in which each is strongest, with the place marked. Latents are taken in the order of how often their best images are of few letters.

# %%
sae = Sae.load(folder)
with torch.no_grad():
    x = trunk(images[n_train:]).flatten(2).transpose(1, 2)  # [images, 36, 64]
    latents = sae.encode(x.flatten(0, 1)).view(len(x), 36, -1)
strongest, places = latents.max(1)  # [images, latents]
top = strongest.topk(8, dim=0).indices  # [8, latents]
alive = (strongest > 0).sum(0) >= 30
varied = torch.tensor([len(set(labels[n_train:][top[:, latent]].tolist())) for latent in range(sae.d_sae)])
shown = [int(latent) for latent in torch.argsort(varied + 1000 * ~alive)[[0, 10, 20, 40, 80, 120]]]

figure, axes = plt.subplots(len(shown), 8, figsize=(8, 1.05 * len(shown)))
for line, latent in zip(axes, shown, strict=True):
    for axis, image in zip(line, top[:, latent].tolist(), strict=True):
        y, x_ = divmod(int(places[image, latent]), 6)
        axis.imshow(images[n_train + image, 0].numpy(), cmap="gray_r")
        axis.add_patch(plt.Rectangle((4 * x_ - 3, 4 * y - 3), 10, 10, fill=False, color="C3"))
        axis.set_xticks([])
        axis.set_yticks([])
    line[0].set_ylabel(latent, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# An arm of an S, the crossing of a 4, the lower left of a C: with eight latents per place the SAE explains nearly all of what the network's own channels, at the same number,
# explain little more than half of, and many latents are strokes that several letters share.
#
# ## Take a part away
#
# If a latent stands for a part of a letter, the letter without it should look like another. Each latent that is rare (on fewer than a tenth of all places) is taken out of all
# images of a letter, twice as much as is there, and the rest of the network reads what is left. What the SAE does not reconstruct stays as it was.

# %%
head = model[1:]
unseen = labels[n_train:]
density = (latents > 0).float().mean((0, 1))
with torch.no_grad():
    activations = trunk(images[n_train:])


@torch.no_grad()
def read_without(letter, latent, times=2.0):
    """Return what the network reads in the unseen images of a letter if a latent is taken out of them."""
    of_letter = unseen == letters.index(letter)
    change = times * latents[of_letter][:, :, latent, None] * sae.W_dec[latent]  # [images, 36, 64]
    return head(activations[of_letter] - change.transpose(1, 2).reshape(-1, 64, 6, 6)).argmax(1)


results = []
for number, letter in enumerate(letters):
    common = strongest[unseen == number].mean(0).topk(40).indices.tolist()
    before = np.bincount(read_without(letter, 0, times=0.0), minlength=len(letters))
    for latent in (latent for latent in common if density[latent] < 0.1):
        after = np.bincount(read_without(letter, latent), minlength=len(letters))
        gain = after - before
        gain[number] = 0
        other = int(gain.argmax())
        results.append(
            {
                "letter": letter,
                "latent": latent,
                "read as": letters[other],
                "before": before[other] / before.sum(),
                "without": after[other] / before.sum(),
            }
        )
table = pd.DataFrame(results)
table["gain"] = table["without"] - table["before"]
table.nlargest(8, "gain").set_index(["letter", "latent"]).round(2)

# %%
print(
    f"{(table['gain'] > 0.5).sum()} of {len(table)} pairs of a letter and a latent change what most images are read as, {(table['gain'] > 0.1).sum()} more than a tenth"
)

# %% [markdown]
# The letters that come out make sense to an eye, and still hardly any removal changes what most images are read as. The network reads a letter from many parts at once. A list of
# latents with pretty pictures would not have said so; an intervention does.
#
# ## Language models that something else runs
#
# Text models have more to say: tokens, documents and positions, so that the report can show contexts. A writer takes them beside the rows (`append(rows, tokens, documents=...,
# positions=...)`); [harvest_with_nnsight.py](../harvest_with_nnsight.py) does all of it in sixty lines. For any model of transformers, no code is needed: a hook point may be the path of
# any module, such as `transformer.h.1.mlp.act`.
#
# With a GPU and vLLM, the harvest itself runs in vLLM (not run here):
#
# ```python
# from thresher import harvest                # pip install 'thresher[vllm]'
#
# harvest(
#     model="Qwen/Qwen3-0.6B",
#     engine="vllm",
#     hook_points=["blocks.13.resid_post"],
#     dataset="my/texts",
#     batch_size=64,
#     store="runs/qwen/store",
# )
# ```
#
# More: [hook points](../../docs/hook-points.md), [vLLM](../../docs/vllm.md), [importing what other tools cached](../../docs/importing.md). Next: [SAEs from and to other
# libraries](8_other_formats.ipynb).
