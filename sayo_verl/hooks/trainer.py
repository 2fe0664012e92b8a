"""The trainer with attention, which requests statistics in the old-log-prob pass and passes them to the estimator.

A method with counterfactual images gets a further pass of the same responses for each, after the first. The method
computes its credit in a thread while verl runs the reference and value passes, during which this process waits.

It overrides methods of verl's base trainer and calls verl's own in each: ``__init__``, ``_setup`` (handshake),
``_compute_old_log_prob``, ``_compute_advantage``, and ``fit``, ``step`` and ``_step_once`` to record rollouts
(``record``).

With recorded rollouts it also trains verl's own estimators. Their batches then get verl's own passes and advantages.
"""

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from sayo_verl import __version__
from sayo_verl.errors import SayoError
from sayo_verl.hooks import store
from sayo_verl.hooks.contract import worker_report
from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, timed_credit
from sayo_verl.hooks.record import Recorder
from sayo_verl.launch.cluster import node_name
from sayo_verl.launch.record_check import is_recording
from sayo_verl.launch.settings import settings_from_config
from sayo_verl.methods import Credit, Method, Needs, Signals
from sayo_verl.probe.statistics import INTERVENTION_KEY, REQUEST_KEY, StatisticsRequest
from sayo_verl.probe.taps import describe_layers
from sayo_verl.vision.intervention import Intervention


class PendingCredit(NamedTuple):
    """Credit that is being computed since the log-prob passes of a batch.

    Attributes:
        rows: key of each row and whether it is padding, in the order of the batch.
        signals: of these rows.
        probe_seconds: time of the measurement, summed over all workers.
        credit: ``timed_credit`` of the signals.
    """

    rows: list[tuple[str, bool]]
    signals: Signals
    probe_seconds: float
    credit: Future[tuple[Credit, float]]


def rows_of(batch: KVBatchMeta) -> list[tuple[str, bool]]:
    return [(key, bool(tag.get("is_padding", False))) for key, tag in zip(batch.keys, batch.tags, strict=True)]


class AttentionTrainer(PPOTrainer):
    """verl's base trainer with attention; a class of ``modes`` names one of verl's trainers first and this one last.

    Python then calls verl's trainer, this class and verl's base trainer, in this order. What verl's trainer does around
    the log-prob pass, such as restoring earlier weights, is thus done around the passes here too.

    Attributes:
        base_mode: verl's name of the trainer. verl compares ``trainer_mode`` with it in many places (replay buffer,
            refill, checkpointing), so the mode is set to this name before the ``__init__`` of verl's base trainer.
    """

    base_mode: str
    actor_rollout_wg: Any
    _recorder: Recorder | None = None  # before ``_setup``, and without recorded rollouts

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        attn = OmegaConf.to_container(config.algorithm.attn, resolve=True)
        settings = settings_from_config(config.algorithm.adv_estimator, attn)  # type: ignore[arg-type]
        if settings.method is None and not is_recording(config):
            raise SayoError(
                "A09",
                "this trainer was selected for one of verl's own estimators",
                where="algorithm.adv_estimator",
                got=config.algorithm.adv_estimator,
                fix="set trainer.v1.trainer_mode to one of verl's, such as sync; the launcher adds attention to it",
            )
        self._method: Method | None = settings.method
        self._spread_floor = settings.spread_floor
        self._needs = None if self._method is None else self._method.needs()
        if self._needs is not None:
            self._request = dataclasses.replace(self._needs.statistics, path=str(config.sayo.probe_path))
        self._log_prob_seconds = 0.0
        self._counterfactual_seconds: dict[str, float] = {}  # of each intervention's pass, by its key
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sayo-credit")
        self._pending: PendingCredit | None = None
        super().__init__(config)

    def _setup(self) -> None:
        super()._setup()
        if is_recording(self.config):
            self._recorder = Recorder(self.config, self._method, self._spread_floor, self.tokenizer, self.val_dataset)
        self._handshake()

    def _handshake(self) -> None:
        """Check before step 1 that every actor worker runs this version, the mixin and a model that can be probed.

        verl logs a plug-in that fails to load at DEBUG only and continues without it. This check finds such a worker,
        also on a node that joined the cluster after ``check_cluster``.

        Raises:
            SayoError: X03 with the first worker that differs; from a worker L18 and P02 for an unknown model, P03 and
                P11 for a layer that is missing or has no full attention, P16, P17, P24 and P29 for a path of the probe
                that cannot run or is wrong there.
        """
        request = (self._recorder.request if self._recorder else self._request).to_wire()
        workers = self.actor_rollout_wg.workers
        reports = ray.get([worker.__ray_call__.remote(worker_report, request) for worker in workers])
        names = {node["NodeID"]: node_name(node) for node in ray.nodes()}
        for report in reports:
            report["node"] = names.get(report["node"], report["node"])  # an earlier version reports the host's name
        for rank, report in enumerate(reports):
            if report["version"] != __version__ or "AttentionStatisticsMixin" not in report["engine_bases"]:
                raise SayoError(
                    "X03",
                    f"worker {rank} did not load this sayo-verl",
                    where=f"node {report['node']}, pid {report['pid']}",
                    got=f"version {report['version']}, engine {report['engine_bases']}",
                    wanted=f"version {__version__} and an engine with AttentionStatisticsMixin",
                    fix="install the same sayo-verl on every node and launch with `python -m sayo_verl.main_ppo`",
                )
        first = reports[0]
        probed = "no probed layer"
        if first["layers"]:
            probed = f"probing {describe_layers(first['layers'], first['n_layers'])}, by the {first['path']} path"
        if first["path_difference"]:
            probed += f" (differs from the reference by {first['path_difference']:.0e})"
        nodes = list(dict.fromkeys(str(report["node"]) for report in reports))
        if len(nodes) > 1:
            probed += f", on {len(nodes)} nodes: {'; '.join(nodes)}"
        print(
            f"sayo-verl {__version__}: handshake with {len(reports)} worker(s), engine {first['engine_bases'][0]}, "
            + probed
        )

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        """verl's step; held-out prompts are generated beside its prompts, while the engine has the step's weights."""
        if self._recorder is not None and self._recorder.is_due(self.global_steps - 1):
            self._recorder.submit(self, self.global_steps - 1)
        return super().step(metrics, timing_raw)

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        if self._recorder is not None:
            self._recorder.wait(self)  # before the engine sleeps or is interrupted
        return super()._step_once(metrics, timing_raw, sample_batch_size)

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's; then the last policy is recorded."""
        super().fit(agent_loop_manager)
        if self._recorder is None or not self._recorder.started:  # no step was trained
            return
        if self.base_mode == "separate_async" and self.current_mode.value == "rollout":  # after verl's last validation
            self.switch_to_trainer()
        self._recorder.submit(self, self.global_steps - 1)  # verl has counted past the last step
        self._recorder.wait(self)
        if self.base_mode != "separate_async":
            self.on_sample_end()  # the engine gives its memory back to the trainer
        self._recorder.record(self)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._needs is None:
            out = super()._compute_old_log_prob(batch, metrics)
        else:
            start = time.perf_counter()
            out = self._probe(batch, metrics, self._request)
            self._log_prob_seconds = time.perf_counter() - start
            self._counterfactual_seconds = self._counterfactual_passes(batch, self._needs, int(self.global_steps))
            self._pending = self._start_credit(out)
        if self._recorder is not None:
            self._recorder.started = True
            if (spent := self._recorder.record(self)) is not None:
                metrics["sayo/viz_seconds"], metrics["sayo/viz_wait_seconds"] = spent
        return out

    def _probe(self, batch: KVBatchMeta, metrics: dict, request: StatisticsRequest) -> KVBatchMeta:
        """verl's log-prob pass with a request."""
        batch.extra_info[REQUEST_KEY] = request.to_wire()
        try:
            return super()._compute_old_log_prob(batch, metrics)
        finally:
            # The reference pass of a LoRA run uses the same worker call and must not have the request.
            batch.extra_info.pop(REQUEST_KEY, None)

    def probe_rows(self, batch: KVBatchMeta, metrics: dict, needs: Needs, *, mask_step: int) -> None:
        """Measure rows that are not trained on, by the passes of training.

        Args:
            batch: the rows.
            metrics: gets verl's metrics of the pass.
            needs: what to measure.
            mask_step: the step on which the masks of changed images depend.
        """
        self._probe(batch, metrics, needs.statistics)
        self._counterfactual_passes(batch, needs, mask_step)

    def _start_credit(self, batch: KVBatchMeta) -> PendingCredit:
        """Fetch the signals and start the credit in the thread.

        The fetch is not in the thread, because TransferQueue's client is not documented as thread-safe.
        """
        assert self._method is not None
        assert self._needs is not None
        signals, probe_seconds = store.fetch_signals(batch, self._needs, self.config.sayo.get("correct_from"))
        credit = self._thread.submit(timed_credit, self._method, signals)
        return PendingCredit(rows_of(batch), signals, probe_seconds, credit)

    def _counterfactual_passes(self, batch: KVBatchMeta, needs: Needs, step: int) -> dict[str, float]:
        """Run a log-prob pass of the same responses for each intervention: its key -> seconds."""
        seconds = {}
        for intervention in needs.interventions:
            start = time.perf_counter()
            self._counterfactual_pass(batch, intervention, needs.statistics.coverage, step)
            seconds[intervention.key] = time.perf_counter() - start
        return seconds

    def _counterfactual_pass(self, batch: KVBatchMeta, intervention: Intervention, coverage: float, step: int) -> None:
        """Run a log-prob pass of the same responses with the changed image.

        Workers return it under the intervention's own name and nothing else, so the results of other passes stay.
        """
        before = dict(batch.extra_info)
        batch.extra_info.update(
            {
                INTERVENTION_KEY: {
                    **intervention.to_wire(),
                    "coverage": coverage,
                    "step": step,
                },
                "calculate_entropy": False,
                "compute_loss": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
        )
        try:
            self.actor_rollout_wg.compute_log_prob(batch)
        finally:
            batch.extra_info.clear()
            batch.extra_info.update(before)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._method is None or self._needs is None:
            return super()._compute_advantage(batch, metrics)
        sessions = [key.rsplit("_", 1)[0] for key in batch.keys]
        if len(set(sessions)) != len(sessions):
            raise SayoError(
                "A07",
                "an agent loop returned more than one output per session",
                where="actor_rollout_ref.rollout.agent",
                got=f"{len(sessions)} outputs of {len(set(sessions))} sessions",
                wanted="one output per session",
                fix="use the single-turn agent loop; a group would count such a session twice",
            )
        start = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is None or pending.rows != rows_of(batch):  # verl changed the batch in between
            pending = self._start_credit(batch)
        norm_by_std = bool(self.config.algorithm.norm_adv_by_std_in_grpo)
        context = AdvantageContext(self._method, pending.signals, norm_by_std, self._spread_floor, pending.credit)
        token = CURRENT.set(context)
        try:
            out = super()._compute_advantage(batch, metrics)
        except SayoError as error:
            raise store.name_row(error, batch) from error
        finally:
            CURRENT.reset(token)
        if context.reward is None:
            raise SayoError(
                "A08",
                "verl computed advantages without calling the registered estimator",
                where=f"algorithm.adv_estimator={self._method.name}",
                fix="another plug-in replaced it, or verl changed; run pytest tests/hooks/test_contract.py",
            )
        store.put_token_level_rewards(batch, context.reward)
        ranks = len(self.actor_rollout_wg.workers)
        metrics.update({f"sayo/{name}": value for name, value in context.metrics.items()})
        metrics.update({f"sayo/{name}/mean": value for name, value in store.fetch_reward_parts(batch).items()})
        metrics["sayo/probe_seconds"] = pending.probe_seconds / ranks
        metrics["sayo/probe_share_of_log_prob"] = pending.probe_seconds / ranks / self._log_prob_seconds
        metrics["sayo/advantage_seconds"] = time.perf_counter() - start
        if passes := self._counterfactual_seconds:
            metrics["sayo/counterfactual_seconds"] = sum(passes.values())
        if len(passes) > 1:
            metrics.update({f"sayo/counterfactual_seconds/{key}": spent for key, spent in passes.items()})
        if self.base_mode != "sync":
            metrics.update({f"sayo/{name}": value for name, value in store.staleness(batch, self.global_steps).items()})
        return out
