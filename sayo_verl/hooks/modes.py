"""verl's trainers with the attention mixin, registered under separate names."""

from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from sayo_verl.hooks.trainer import AttentionTrainerMixin


@register_trainer("sayo_sync")
class SayoSync(AttentionTrainerMixin, PPOTrainerSync):
    """Colocated, synchronous training."""

    base_mode = "sync"
