"""Sampling from the whole distribution of a model, as a policy is sampled in training."""

from transformers import GenerationConfig


def without_penalties(given: GenerationConfig) -> GenerationConfig:
    """The model's special tokens alone: ``generate`` takes all other values from the model's own configuration."""
    return GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id
    )
