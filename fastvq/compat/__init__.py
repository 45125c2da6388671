"""Compatibility with vector_quantize_pytorch beyond its classes: its module paths."""
