"""The advantages that the package's core makes of a method's credit."""

import torch

from sayo_verl.methods import Method, Signals, advantages


def of(method: Method, signals: Signals, *rewards: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B, T] with the method's credit, and GRPO's."""
    reward = torch.tensor(rewards)
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    got, _ = advantages(reward, signals.response_mask, signals.uid, method.credit(signals))
    return got, plain
