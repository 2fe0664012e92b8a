"""Show where a model looked: the data of a page, packed maps, the shell of a page and its viewer.

This room imports neither torch nor verl, so a laptop without the training stack can draw a page.
"""
