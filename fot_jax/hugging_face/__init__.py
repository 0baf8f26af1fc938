"""Directories as the `transformers` library reads and writes them."""
