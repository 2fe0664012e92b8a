"""The stages of ``on_gpu.py``, which measure what needs a GPU. Each runs in a separate process."""
