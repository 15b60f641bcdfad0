"""Train the bundled language model `stdlib-lm` on the Python sources of this machine.

The model is a GPT-2 with 4 layers of width 256 and a byte-level BPE of 4,096 tokens, saved in Hugging Face format (bf16
safetensors and tokenizer.json). The text is the interpreter's standard library with its tests, used twice, and the
sources of the installed packages. Files whose hash is in the held-out fraction are never trained on.

    python tools/train_stdlib_lm.py --output models/stdlib-lm

This takes about half an hour on two idle CPU cores with AMX.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.harvest.holdout import document_hash, is_held_out

BOS = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT_SIZE = 256
HOLDOUT_FRACTION = 0.02
MAX_FILE_BYTES = 200_000  # beyond this a source file is mostly a generated table


def read_sources(folder: Path, skip: str | None = None) -> list[str]:
    """Read every UTF-8 Python file below `folder`, in path order."""
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if skip in path.relative_to(folder).parts or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= 200:
            texts.append(text)
    return texts


def split_holdout(texts: list[str], seen: set[int]) -> tuple[list[str], list[str]]:
    """Drop repeated documents and split the rest into training and held-out ones."""
    train, held_out = [], []
    for text in texts:
        document = document_hash(text)
        if document in seen:
            continue
        seen.add(document)
        (held_out if is_held_out(document, HOLDOUT_FRACTION) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Tokenize documents and pack them, a BOS before each, into contexts `[n, CONTEXT_SIZE]`."""
    bos = tokenizer.token_to_id(BOS)
    assert bos is not None
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream.append(bos)
        stream.extend(encoding.ids)
    n_contexts = len(stream) // CONTEXT_SIZE
    return torch.tensor(stream[: n_contexts * CONTEXT_SIZE]).view(n_contexts, CONTEXT_SIZE)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, contexts: torch.Tensor) -> float:
    """Return the mean next-token cross-entropy, in nats per token."""
    total, n_tokens = 0.0, 0
    for ids in contexts.split(32):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        n_tokens += ids[:, 1:].numel()
    return total / n_tokens


def learning_rate_scale(step: int, n_steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup)))


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model in bf16 and its tokenizer, as `from_pretrained` expects them."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT_SIZE
    ).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("models/stdlib-lm"))
    parser.add_argument("--tokens", type=int, default=27_000_000, help="training tokens")
    parser.add_argument("--batch-size", type=int, default=32, help="contexts per step")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak rate of embeddings, norms and biases")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    seen: set[int] = set()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    stdlib_train, stdlib_held_out = split_holdout(read_sources(stdlib, skip="site-packages"), seen)
    package_train, package_held_out = split_holdout(read_sources(Path(sysconfig.get_paths()["purelib"])), seen)
    rng.shuffle(package_train)
    tokenizer = train_tokenizer(rng.sample(stdlib_train, len(stdlib_train) // 2) + package_train[:1500])

    stdlib_contexts = pack(tokenizer, stdlib_train)
    held_out = {
        "stdlib": pack(tokenizer, stdlib_held_out),
        "packages": pack(tokenizer, rng.sample(package_held_out, min(len(package_held_out), 250))),
    }
    n_wanted = arguments.tokens // CONTEXT_SIZE
    package_contexts = pack(tokenizer, package_train)[: max(0, n_wanted - 2 * len(stdlib_contexts))]
    contexts = torch.cat([stdlib_contexts, stdlib_contexts, package_contexts])
    contexts = contexts[torch.randperm(len(contexts))][:n_wanted]
    n_steps = len(contexts) // arguments.batch_size
    print(
        f"{len(contexts) * CONTEXT_SIZE:,} training tokens, {stdlib_contexts.numel():,} of them the standard library's "
        f"and seen twice; held out: {held_out['stdlib'].numel():,} and {held_out['packages'].numel():,} of packages"
    )

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=CONTEXT_SIZE,
            n_embd=256,
            n_layer=4,
            n_head=4,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    peaks = [arguments.muon_lr, arguments.adam_lr]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(model.transformer(ids[:, :-1]).last_hidden_state)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    if shutil.which("g++"):
        loss_of = torch.compile(loss_of)

    curve, started, training_seconds = [], time.monotonic(), 0.0
    progress = tqdm(total=n_steps * arguments.batch_size * CONTEXT_SIZE, unit="token", unit_scale=True, mininterval=10)
    for step in range(n_steps):
        scale = learning_rate_scale(step, n_steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        ids = contexts[step * arguments.batch_size : (step + 1) * arguments.batch_size]
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.update(ids.numel())
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 300 == 0 or step + 1 == n_steps:
            training_seconds = time.monotonic() - started
            losses = {name: round(held_out_loss(model, ids), 4) for name, ids in held_out.items()}
            tokens = (step + 1) * arguments.batch_size * CONTEXT_SIZE
            curve.append({"tokens": tokens, "train": round(loss.item(), 4), **losses})
            tqdm.write(json.dumps(curve[-1]))
            save(model, tokenizer, arguments.output)
    (arguments.output / "training.json").write_text(
        json.dumps(
            {
                "seed": arguments.seed,
                "batch_size": arguments.batch_size,
                "muon_lr": arguments.muon_lr,
                "adam_lr": arguments.adam_lr,
                "seconds": round(training_seconds),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "holdout_fraction": HOLDOUT_FRACTION,
                "stdlib_tokens": stdlib_contexts.numel(),
                "package_tokens": package_contexts.numel(),
                "held_out_tokens": {name: ids.numel() for name, ids in held_out.items()},
                "curve": curve,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
