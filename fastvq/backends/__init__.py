"""Backends: one folder or module for each name that `use_backend` takes, and the choice between them."""
