"""Exact attention statistics of a model's own forward pass. Torch only: knows neither verl nor methods."""
