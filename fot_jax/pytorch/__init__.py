"""The model for PyTorch: files that are copied into every converted directory that needs them."""
