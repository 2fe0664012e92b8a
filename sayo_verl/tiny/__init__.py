"""A tiny Qwen3-VL for the drawn scenes: its builder, its supervised warm-up and its evaluation."""
