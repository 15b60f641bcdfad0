"""The feature index: what every latent of every SAE responds to, in one pass over the store."""
