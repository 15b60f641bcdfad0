# %% [markdown]
# # 8. From and to SAELens, Gemma Scope and the Hub
#
# SAEs are worth more when others can load them, and there are thousands of published ones to compare with. This notebook writes one SAE in every format that can hold it, builds
# a file as Gemma Scope publishes them and reads it, evaluates both on the same rows, and prepares an upload to the Hugging Face Hub. Along the way it answers a question of its
# own: what does a TopK SAE lose when its k is replaced by thresholds, as JumpReLU has them?
#
# Nothing is downloaded or uploaded: files are made here in the layouts that are published. It takes half a minute if notebook [3](3_latent.ipynb) has been run.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from thresher import ActivationStore, Sae, ThresherError, evaluate, harvest, train
from thresher.shared.exchange.push import push

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
hook_point = "blocks.2.resid_post"
run = Path("runs/notebooks")

# %%
harvest(model="stdlib-lm", hook_points=[hook_point], tokens=500_000, store=run / "store")
(folder,) = train(
    store=run / "store",
    output=run / "saes",
    sae=[{"name": "topk-k32", "hook_point": hook_point, "d_sae": 2048, "k": 32}],
    batch_size=2048,
    epochs=3.0,
)
sae = Sae.load(folder)
store = ActivationStore.open(run / "store")

# %% [markdown]
# ## SAELens
#
# What Thresher trains *is* in SAELens's format. Input normalisation is folded into the weights, so the SAE takes and returns raw activations there, too.

# %%
config = json.loads((folder / "cfg.json").read_text())
print([path.name for path in folder.iterdir() if path.is_file()])
print(
    {
        key: config[key]
        for key in ("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "normalize_activations")
    }
)
print(config["metadata"]["hook_name"])

# %% [markdown]
# ```python
# from sae_lens import SAE                               # in SAELens's environment; not run here
#
# sae = SAE.load_from_disk("runs/notebooks/saes/topk-k32")
# ```
#
# ## Every other format that can hold it
#
# `Sae.save(path, format=...)` writes only what computes the same, and refuses the rest by name; `thresher sae convert` does so on the command line. Here each file is read
# back, and reconstructions of the same rows are compared.

# %%
x = store.read(hook_point, 512, 1024).float()
lines = []
for name in (
    "saelens",
    "sparsify",
    "dictionary_learning",
    "llamascopium",
    "gemma-scope",
    "gemma-scope-2",
    "circuit-tracer",
):
    try:
        written = sae.save(run / "formats" / name, format=name)
        again = Sae.load(written)
        with torch.no_grad():
            difference = float((again(x) - sae(x)).abs().max() / x.abs().max())
        files = ", ".join(sorted(path.name for path in written.iterdir()))
        lines.append({"format": name, "files": files, "largest difference": f"{difference:.1e}", "refused because": ""})
    except ThresherError as error:
        lines.append({"format": name, "files": "", "largest difference": "", "refused because": str(error)})
pd.set_option("display.max_colwidth", 200)
pd.DataFrame(lines).set_index("format")

# %% [markdown]
# Gemma Scope's files hold a threshold per latent and no k, so a TopK SAE cannot be one exactly.
#
# ## A file like Gemma Scope's
#
# Gemma Scope publishes `params.npz` with five arrays; where the SAE belongs, and its L0, are only in the path. So here is one: the weights of our SAE, with thresholds in place
# of k. Each latent gets the threshold above which it fires exactly as often as it did among the top 32, over training rows.

# %%
block = 32_768
rows = store.read(hook_point, 0, block)[store.training_mask(0, block)].float()
with torch.no_grad():
    fires = sae.encode(rows) > 0
    pre_activations = sae.pre_activations(rows)
ordered = pre_activations.sort(dim=0, descending=True).values
per_latent = ordered.gather(0, fires.sum(0)[None].clamp_max(len(rows) - 1))[0].clamp_min(0)
one_for_all = torch.full_like(per_latent, float(pre_activations.flatten().topk(int(fires.sum())).values[-1]))

arrays = {name: getattr(sae, name).detach().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["W_enc"]  # Gemma Scope does not subtract b_dec from x
theirs = run / "formats" / "gemma-scope-2b-pt-res" / "layer_2" / "width_2k"
for name, threshold in (("average_l0_32", per_latent), ("average_l0_31", one_for_all)):
    (theirs / name).mkdir(parents=True, exist_ok=True)
    np.savez(theirs / name / "params.npz", threshold=threshold.numpy(), **arrays)
Sae.load(theirs / "average_l0_32")

# %% [markdown]
# `Sae.load` found the format from the files and the hook point from the path. On the Hub it would be `Sae.load("hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")`.
#
# ## What does a threshold cost?
#
# `evaluate` takes SAEs of any format side by side. The path says that ours belongs to Gemma 2, which is not the store's model, and that would be refused:
# `allow_other_model` says that we know better.

# %%
results = evaluate(
    store=run / "store",
    saes=[str(folder), str(theirs / "average_l0_32"), str(theirs / "average_l0_31")],
    output=run / "formats" / "evaluation",
    max_rows=20_000,
    model_rows=4096,
    feature_rows=0,
    allow_other_model=True,
)
table = pd.DataFrame(results)
names = ["top 32", "a threshold per latent", "one threshold for all"]
table.index = names
table[["l0", "published_l0", "explained_variance", "ce_loss_score", "kl_sae"]].round(4)

# %%
figure, axis = plt.subplots(figsize=(6, 3))
with torch.no_grad():
    held = store.held_out_contexts().repeat(store.context_size) & store.row_mask(0, store.n_rows)
    unseen = store.read(hook_point, 0, store.n_rows)[held][:20_000].float()
    for name, threshold in zip(names[1:], (per_latent, one_for_all), strict=True):
        n_active = (sae.pre_activations(unseen) > threshold).sum(1).numpy()
        axis.hist(n_active, np.arange(0, 130, 2), histtype="step", lw=1.5, label=f"{name}: mean {n_active.mean():.1f}")
axis.axvline(32, color="gray", lw=1, label="top 32")
axis.set(xlabel="active latents per token, held-out rows", ylabel="rows")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# So a threshold costs next to nothing here, in either form: with as many latents on average, the same weights reconstruct as well, and the number of latents follows the token. `published_l0` is what the path promised: the comparison with what is
# measured is the first thing to look at when SAEs of others are loaded. A large difference means another model, another hook point or another normalisation.
#
# ## The Hub
#
# `thresher sae push FOLDER --repo USER/NAME` uploads a sweep in the layout from which SAELens loads, with a model card made of what `evaluate` measured. With `dry_run` nothing is sent:

# %%
card, *files = push(run / "saes", "you/stdlib-lm-saes", None, "mit", private=False, dry_run=True)
print("\n".join(card.splitlines()[:24]), "\n...")
print("\n".join(files))

# %% [markdown]
# Others then load one with `Sae.load("hf://you/stdlib-lm-saes/topk-k32")`, or with SAELens's `SAE.from_pretrained("you/stdlib-lm-saes", "topk-k32")`. Downloads are checked against the
# Hub's checksums and kept in its cache, from where they also load when there is no network. Stores travel the same way, with `thresher store push` and `pull`, and
# `thresher store import` reads activations that SAELens and others cached.
#
# More: [formats, conventions and what is refused](../../docs/formats.md), [importing activations](../../docs/importing.md).
