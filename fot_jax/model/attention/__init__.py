"""Attention in parts: each block of keys by itself, merged into one softmax (paper §3)."""
