"""Read run folders and show them: curves, first/last tables and the progress of a run in flight.

This room knows files only (metrics.jsonl, train.log, run.json); it imports neither torch nor verl, so a laptop without
the training stack can read a run.
"""
