"""The stages of ``on_gpu.py``: what can only be measured on a card. Each runs in a process of its own."""
