"""Load language models, measure their hook points, and read or replace activations."""
