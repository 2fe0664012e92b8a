"""Parts of ``benchmarks/probe_cost.py``: shapes and arithmetic, workload, meters, cases, raw numbers, page."""
