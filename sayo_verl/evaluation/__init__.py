"""Evaluation of a checkpoint on public benchmarks, in lmms-eval: what ``scripts/eval_lmms.sh`` runs.

Imports the standard library only: the script plans and refuses with any Python from 3.11 on. verl merges the checkpoint in
the project's environment, and lmms-eval answers in an environment of its own.
"""
