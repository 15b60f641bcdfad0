"""Steer with lm-evaluation-harness's model `steered`; run by the peers' interpreter.

usage: lm_eval_steered.py MODEL_FOLDER STEERING_FILE TOKENS.npy OUTPUT.npz [TASK_FOLDER]
"""

import sys

import lm_eval
import numpy as np
import torch
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.tasks import TaskManager

model, steering, tokens, output, *tasks = sys.argv[1:]
lm = SteeredModel(pretrained=model, steer_path=steering, device="cpu", dtype="float32", batch_size=2)
found = {"logits": lm._model_call(torch.from_numpy(np.load(tokens))).detach().numpy()}
if tasks:
    manager = TaskManager(include_path=tasks[0], include_defaults=False)
    done = lm_eval.simple_evaluate(
        lm, tasks=["continuations"], task_manager=manager, num_fewshot=0, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(done["samples"]["continuations"], key=lambda sample: sample["doc_id"])
    found["log_probabilities"] = np.array([sample["resps"][0][0][0] for sample in samples])
np.savez(output, **found)
