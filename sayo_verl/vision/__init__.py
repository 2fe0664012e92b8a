"""Visual tokens of boxes, image grids and counterfactual images. Imports torch and numpy only."""
