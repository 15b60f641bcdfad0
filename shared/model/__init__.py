"""What is measured about a language model before its activations are trusted."""
