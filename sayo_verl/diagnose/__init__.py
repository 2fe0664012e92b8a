"""``sayo diagnose``: where a model looks over a set of questions, and whether that goes with right answers."""
