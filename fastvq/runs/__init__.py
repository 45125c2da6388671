"""What one does with a trained run: load, encode, decode, sample, evaluate, compare, plot."""
