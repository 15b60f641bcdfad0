"""What is read about a model before it is loaded: adapters, names of weights, tokenizer and longest context."""
