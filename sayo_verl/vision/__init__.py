"""From boxes and image grids to visual tokens. Torch and numpy only."""
