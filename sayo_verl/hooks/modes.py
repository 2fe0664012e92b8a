"""verl's trainers with the mixin in front, registered under names of their own."""

from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from sayo_verl.hooks.trainer import AttentionTrainerMixin


@register_trainer("sayo_sync")
class SayoSync(AttentionTrainerMixin, PPOTrainerSync):
    """Colocated, synchronous training."""

    base_mode = "sync"
