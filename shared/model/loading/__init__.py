"""What loading a model needs to know of it: adapters, names of weights, its tokenizer and its longest context."""
