"""Evaluate SAEs with SAELens on given features and rows; run by the peers' interpreter.

usage: saelens_synthetic.py TRUTH.npz OUTPUT.json SAE_FOLDER...
"""

import json
import sys

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data


class GivenValues:
    """What the evaluation asks of a generator, over values in memory."""

    def __init__(self, values):
        self.values = values
        self.next = 0

    def sample(self, n):
        part = self.values[self.next : self.next + n]
        self.next += n
        return part


def main(truth, output, *folders):
    given = {name: torch.from_numpy(value) for name, value in np.load(truth).items()}
    features = FeatureDictionary(*given["vectors"].shape, initializer=None)
    features.feature_vectors.data, features.bias.data = given["vectors"], given["bias"]
    results = {}
    for folder in folders:
        n = len(given["values"])
        found = eval_sae_on_synthetic_data(
            SAE.load_from_disk(folder), features, GivenValues(given["values"]), num_samples=n, batch_size=1000
        ).to_dict()
        results[folder] = {**found.pop("classification"), **found}
    with open(output, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
