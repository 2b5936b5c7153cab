"""Torch-pruning."""
