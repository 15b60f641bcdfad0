"""What an evaluation makes beside the SAEs that it is given: baselines without training, and refined SAEs."""
