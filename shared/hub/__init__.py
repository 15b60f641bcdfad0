"""The Hugging Face Hub: files and folders of its repositories, downloaded with checksums and uploaded."""
