"""What exists only because vector_quantize_pytorch has it."""
