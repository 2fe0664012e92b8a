"""Exact attention statistics of a model's own forward pass. Imports torch, but neither verl nor methods."""
