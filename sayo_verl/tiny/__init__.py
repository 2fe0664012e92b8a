"""A tiny Qwen3-VL for the drawn scenes, with its supervised warm-up and its evaluation."""
