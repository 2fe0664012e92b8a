"""verl's three trainers with the attention pass between them and their base class, registered under separate names."""

from verl.trainer.ppo.v1 import (
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)

from sayo_verl.hooks.trainer import AttentionTrainer


@register_trainer("sayo_sync")
class SayoSync(PPOTrainerSync, AttentionTrainer):
    """Trainer and rollouts share devices and take turns."""

    base_mode = "sync"


@register_trainer("sayo_colocate_async")
class SayoColocateAsync(PPOTrainerColocateAsync, AttentionTrainer):
    """Trainer and rollouts share devices. Rollouts that are not finished are resumed after the update."""

    base_mode = "colocate_async"


@register_trainer("sayo_separate_async")
class SayoSeparateAsync(PPOTrainerSeparateAsync, AttentionTrainer):
    """Rollouts have devices of their own and continue while the trainer makes several updates.

    verl restores the step's first weights for the log-prob pass of each update. ``AttentionTrainer`` comes after verl's
    class, so its passes run between verl's restore of those weights and its return to the current ones.
    """

    base_mode = "separate_async"
