"""What Python users and notebooks see: a latent's card, and the table of an evaluation."""
