"""The demo: train on the shipped images, learn a prior, sample, and write the results as one page."""
