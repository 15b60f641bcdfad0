"""Stores in data set repositories of the Hugging Face Hub: uploaded and downloaded, both resumable."""
