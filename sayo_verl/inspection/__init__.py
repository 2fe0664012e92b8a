"""``sayo inspect``: prepared data as the model will see it, checked with its own processor and drawn on a page."""
