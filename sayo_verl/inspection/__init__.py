"""``sayo inspect``: what prepared data is to the model, checked with its own processor and drawn on a page."""
