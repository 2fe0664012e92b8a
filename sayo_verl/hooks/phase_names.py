"""The phases of a step: verl's timer, the trainer's method, what it is called, and the actors that work in it.

The watchdog learns a phase from the timer (``hooks/phases.py``), the guard of the trainer from the method that raised
(``hooks/step_guard.py``). Both say the same words for it.
"""

from dataclasses import dataclass

START = "start"  # before the first timer

WORKERS, SERVERS, LOOPS, REWARDS = "WorkerDict", "vLLMHttpServer", "AgentLoopWorkerTQ", "RewardLoopWorker"


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        says: its name in messages.
        timer: verl's name in ``marked_timer``, or ``validate`` or ``START`` of ``hooks/phases.py``; empty if none.
        method: of verl's trainer; empty if none.
        actors: classes of the actors that work in it; empty: the trainer itself.
    """

    says: str
    timer: str = ""
    method: str = ""
    actors: tuple[str, ...] = ()


PHASES = (
    Phase("start: models are loaded and servers start", START, actors=(WORKERS, SERVERS, LOOPS, REWARDS)),
    Phase("reading of prompts", method="prepare_step"),
    Phase("rollouts and their rewards", "gen", "sample", (SERVERS, LOOPS, REWARDS)),
    Phase("rewards of a model", "reward", "_compute_reward_colocate", (REWARDS,)),
    Phase("log-probs of the old policy", "old_log_prob", "_compute_old_log_prob", (WORKERS,)),
    Phase("log-probs of the reference", "ref", "_compute_ref_log_prob", (WORKERS,)),
    Phase("values of the critic", "values", "_compute_values", (WORKERS,)),
    Phase("advantages", method="_compute_advantage"),
    Phase("update of the critic", "update_critic", "_update_critic", (WORKERS,)),
    Phase("update of the actor", "update_actor", "_update_actor", (WORKERS,)),
    Phase("saving of a checkpoint", "save_checkpoint", "_save_checkpoint", (WORKERS,)),
    Phase("weights to the rollout engine", "update_weights", "on_step_end", (WORKERS, SERVERS)),
    Phase("validation", "validate", "_validate", (SERVERS, LOOPS, REWARDS)),
    Phase("metrics", method="_compute_metrics"),
)
OF_TIMER = {phase.timer: phase for phase in PHASES if phase.timer}
OF_METHOD = {phase.method: phase for phase in PHASES if phase.method}
