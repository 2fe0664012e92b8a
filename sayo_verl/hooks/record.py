"""Rollouts of a few held-out prompts through training, probed and saved for `sayo report`.

Step s is the policy after s steps of training. At the start of step s + 1 the rollout engine has exactly these weights
and is awake, so the prompts are generated beside those of the training batch, in TransferQueue's partition "val" and
with the sampling of training. They are probed after the training batch's own log-prob pass, with the same weights, by
the same calls. Nothing is written to the partition "train", and no random number of this process is drawn. The policy
after the last step is recorded when training has ended.

A recording that fails ends the run: a run whose report lacks steps without a word would be worse, and the error says
how to turn recording off.

Shape suffixes: T response tokens, V visual tokens, W words, k most attended visual tokens.
"""

import dataclasses
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import NonTensorData
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn

from sayo_verl.errors import SayoError
from sayo_verl.hooks import record_agent, store
from sayo_verl.hooks.estimator import timed_credit
from sayo_verl.hooks.held_out import choose_rows, pictures_of, question_of
from sayo_verl.launch.record_check import OFF, TOP_PATCHES, observation, recorded_needs, run_folder
from sayo_verl.methods import Credit, Method, Signals, added_by_bonuses, advantages
from sayo_verl.models.families import family_of
from sayo_verl.probe.plan import image_tiles
from sayo_verl.probe.statistics import WIRE_PREFIX, StatisticsRequest
from sayo_verl.probe.taps import describe_layers, resolve_layers
from sayo_verl.reward.number import number
from sayo_verl.view.maps import Packed
from sayo_verl.view.seen import MapSet, SeenImage, SeenPrompt, SeenResponse, pieces_of, special_tokens, words_of
from sayo_verl.view.store import write_step
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import box_masks, check_boxes

MASK_STEP = 0  # changed images depend on the step; a fixed one makes their effect comparable through training


@dataclass
class Pending:
    """Prompts that are being generated.

    Attributes:
        step: steps of training that the policy has had.
        uids: one per prompt.
        waited: seconds of waiting for verl's agent loops, in which those of the training batch start and generate too.
        batch: the finished rows.
    """

    step: int
    uids: list[str]
    waited: float
    batch: KVBatchMeta | None = None


class Recorder:
    """Records the held-out prompts of a run.

    Args:
        config: the run's configuration.
        method: the run's method; None for an estimator of verl's own.
        spread_floor: see ``sayo_verl.methods.group``.
        tokenizer: of the model.
        dataset: verl's validation data set.

    Raises:
        SayoError: A32 if no row has an image, and the errors of ``decoded``.
    """

    def __init__(
        self, config: DictConfig, method: Method | None, spread_floor: float | None, tokenizer: Any, dataset: Any
    ) -> None:
        folder = run_folder(config)
        assert folder is not None  # the launcher has checked it
        self._config, self._folder = config, folder
        self._method, self._spread_floor, self._tokenizer, self._dataset = method, spread_floor, tokenizer, dataset
        self._seen, self.needs = observation(config, method), recorded_needs(config, method)
        self._model = omega_conf_to_dataclass(config.actor_rollout_ref.model).hf_config  # as the workers load it
        n_layers = self._model.get_text_config().num_hidden_layers
        numbers = resolve_layers(self._seen.layers, n_layers, where="the recorded layers")
        self._layers = describe_layers(numbers, n_layers)
        boxes = method is not None and method.needs().boxes
        self._rows = choose_rows(dataset, int(config.sayo.viz_prompts), boxes=boxes)
        self._pictures = {row: pictures_of(dataset[row], f"held-out row {row}") for row in self._rows}
        self._pending: Pending | None = None
        self.started = False

    @property
    def request(self) -> StatisticsRequest:
        """Of the log-prob pass."""
        return self.needs.statistics

    def is_due(self, step: int) -> bool:
        """Whether the policy after ``step`` steps is recorded."""
        return step % int(self._config.sayo.viz_every) == 0

    def submit(self, trainer: Any, step: int) -> None:
        """Give the prompts to verl's agent loops and return; the rollout engine has the weights after ``step`` steps.

        Args:
            trainer: verl's.
            step: steps of training that the policy has had.
        """
        start = time.perf_counter()
        rollout, n = self._config.actor_rollout_ref.rollout, len(self._rows)
        fields = collate_fn([self._dataset[row] for row in self._rows])
        uids = [str(uuid.uuid4()) for _ in self._rows]
        fields["uid"] = np.array(uids, object)
        fields["__rollout_n__"] = np.array([int(rollout.n)] * n, object)
        fields[record_agent.INNER] = fields.get("agent_name", np.array([rollout.agent.default_agent_loop] * n, object))
        fields["agent_name"] = np.array([record_agent.NAME] * n, object)
        batch = tu.get_tensordict(fields)
        tu.assign_non_tensor_data(batch, "global_steps", trainer.global_steps)
        tu.assign_non_tensor_data(batch, "validate", True)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": trainer.global_steps}] * n
        tq.kv_batch_put(keys=uids, partition_id="val", tags=tags)
        trainer.agent_loop_manager.generate_sequences(batch)
        self._pending = Pending(step, uids, time.perf_counter() - start)

    def wait(self, trainer: Any) -> None:
        """Wait until all rollouts that were submitted are finished.

        Raises:
            SayoError: A32 if a prompt has no rollout.
        """
        if self._pending is None:
            return
        start = time.perf_counter()
        batch, _ = trainer.replay_buffer.sample(
            global_steps=trainer.global_steps, partition_id="val", batch_size=len(self._rows)
        )
        finished = {key.split("_")[0] for key in batch.keys}
        if lost := [row for row, uid in zip(self._rows, self._pending.uids, strict=True) if uid not in finished]:
            raise SayoError(
                "A32",
                "rollouts of held-out prompts could not be generated",
                where=f"held-out rows {lost}, the policy after {self._pending.step} steps",
                fix=f"the agent loop's log has the reason (Error in _run_prompt); {OFF}",
            )
        self._pending.batch = batch
        self._pending.waited += time.perf_counter() - start

    def record(self, trainer: Any) -> tuple[float, float] | None:
        """Probe the finished rows, write the step's file and remove the rows from TransferQueue.

        Args:
            trainer: ``AttentionTrainer``; its actor has the weights to record.

        Returns:
            Seconds of work and of waiting; None if nothing is pending.

        Raises:
            SayoError: A31 if the file cannot be written, A32 if the rows cannot be measured.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.batch is None:
            return None
        start = time.perf_counter()
        with self._failures(pending.step):
            if trainer.reward_loop_manager.reward_loop_worker_handles is None:  # a reward model that shares devices
                trainer._compute_reward_colocate(pending.batch, metrics={})
            batch = self._padded(trainer, pending)
            trainer.probe_rows(batch, {}, self.needs, mask_step=MASK_STEP)
            prompts, notes = self._seen_of(batch, pending)
            seconds = time.perf_counter() - start
            size = write_step(self._folder, pending.step, prompts, seconds, notes)
            tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        seconds = time.perf_counter() - start
        cost = f"{seconds:.1f} s and {pending.waited:.1f} s of waiting for them, {size:,} bytes"
        print(f"sayo-verl: recorded {len(pending.batch)} rollouts of step {pending.step}: {cost}")
        return seconds, pending.waited

    @contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        where = f"{self._folder}, the policy after {step} steps"
        try:
            yield
        except OSError as error:
            raise SayoError(
                "A31",
                "recorded rollouts cannot be written",
                where=where,
                got=error.strerror or error,
                fix=f"free space there and resume the run; {OFF}",
            ) from error
        except (SayoError, ray.exceptions.RayError) as error:
            raise SayoError(
                "A32",
                "rollouts of held-out prompts could not be measured",
                where=where,
                got=str(error).strip().splitlines()[-1],
                fix=f"correct what the message names; {OFF}",
            ) from error

    def _padded(self, trainer: Any, pending: Pending) -> KVBatchMeta:
        """Prompt by prompt, and as many rows as the workers can split."""
        batch = pending.batch
        assert batch is not None
        places = [(pending.uids.index(key.split("_")[0]), _session(key)) for key in batch.keys]
        batch.reorder(sorted(range(len(batch)), key=places.__getitem__))
        group, rollout = trainer.actor_rollout_wg, self._config.actor_rollout_ref.rollout
        if "actor" not in group._dispatch_info:  # as verl's _balance_batch
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        ranks = max(group._dispatch_info["actor"]) + 1
        micro = 1 if rollout.log_prob_use_dynamic_bsz else int(rollout.log_prob_micro_batch_size_per_gpu or 1)
        return upsample_batch_to_divisible_size(batch, ranks * micro, self._tokenizer.eos_token_id)

    def _seen_of(
        self, batch: KVBatchMeta, pending: Pending
    ) -> tuple[list[tuple[SeenPrompt, list[SeenResponse]]], list[str]]:
        """Prompts with their responses, and sentences about the step."""
        request = self._seen.patch_sums
        per_token = StatisticsRequest(
            tuple(s for s in self.request.statistics if s != request), self.request.coverage, self.request.path
        )
        needs = dataclasses.replace(self.needs, statistics=per_token)
        signals, _ = store.fetch_signals(batch, needs, self._config.sayo.correct_from)
        credit, reward_B, advantage, added, notes = self._credit(batch, signals)
        data = store.fetch(batch, ["responses", WIRE_PREFIX + request.key])
        infos = store.reward_info(batch)
        prompts: list[tuple[SeenPrompt, list[SeenResponse]]] = []
        for row, uid in zip(self._rows, pending.uids, strict=True):
            rows = [n for n, one in enumerate(signals.uid) if one == uid and not signals.is_padding[n]]
            prompt = self._prompt(
                row, KVBatchMeta(partition_id=batch.partition_id, keys=[batch.keys[rows[0]]], tags=[{}])
            )
            responses = []
            for n in rows:
                ids = data["responses"].unbind()[n].tolist()
                facts = self._facts(n, signals, credit, reward_B, advantage, infos[n])
                sums_V = data[WIRE_PREFIX + request.key].unbind()[n][: prompt.tokens]
                responses.append(self._response(prompt, n, ids, sums_V, signals, credit, advantage, added, facts))
            prompts.append((prompt, responses))
        return prompts, [*self._notes(batch, pending.step), *notes]

    def _credit(
        self, batch: KVBatchMeta, signals: Signals
    ) -> tuple[Credit, torch.Tensor, torch.Tensor | None, torch.Tensor | None, list[str]]:
        """The method's credit of these rows, and what training would make of it.

        Returns:
            The credit, reward [B], advantages [B, T], what bonuses added to them [B, T] (None without bonuses), and
            sentences about the rows.
        """
        algorithm = self._config.algorithm
        reward_B = torch.stack([row.sum() for row in store.fetch(batch, ["rm_scores"])["rm_scores"].unbind()])
        if self._method is None and algorithm.adv_estimator != "grpo":
            return Credit(), reward_B, None, None, [f"Advantages of {algorithm.adv_estimator} are not recorded."]
        credit = Credit() if self._method is None else timed_credit(self._method, signals)[0]
        options: dict[str, Any] = {
            "norm_by_std": bool(algorithm.norm_adv_by_std_in_grpo),
            "spread_floor": self._spread_floor if self._method is not None else None,
        }
        advantage, _ = advantages(reward_B, signals.response_mask, signals.uid, credit, **options)
        added = added_by_bonuses(advantage, reward_B, signals.response_mask, signals.uid, credit, **options)
        notes = ["Factors and advantages are computed over these rollouts alone; they are not trained on."]
        if algorithm.use_kl_in_reward:
            notes.append("Advantages are without the KL penalty that training takes from the reward.")
        return credit, reward_B, advantage, added, notes

    def _notes(self, batch: KVBatchMeta, step: int) -> list[str]:
        tags = [tag for tag in batch.tags if not tag.get("is_padding", False)]
        versions = sorted({tag[name] for tag in tags for name in ("min_global_steps", "max_global_steps")}, key=str)
        by = " to ".join(str(version) for version in dict.fromkeys((versions[0], versions[-1])))
        row = {"input": "a token is the input", "predicting": "a token is predicted"}[self._seen.query_row]
        notes = [
            f"Generated with the weights of step {by}, measured with the weights of step {step}.",
            f"Attention is read at {self._layers}, where {row}.",
        ]
        if (shown := self._seen.intervention) is not None:
            own = self._method is not None and shown in self._method.needs().interventions
            kind, of = shown.kind, "of the method" if own else "not of the method"
            notes.append(f"The changed image ({kind}, {of}) is the same at every recorded step.")
        short = len(self._rows) * int(self._config.actor_rollout_ref.rollout.n) - len(tags)
        return [*notes, f"{short} rollouts failed and are missing."] if short else notes

    def _prompt(self, row: int, one: KVBatchMeta) -> SeenPrompt:
        """The prompt of a held-out row; ``one``: a row of the queue with its processed image."""
        item, where = self._dataset[row], f"held-out row {row}"
        (inputs,) = store.fetch(one, ["multi_modal_inputs"])["multi_modal_inputs"]
        inputs = inputs.data if isinstance(inputs, NonTensorData) else inputs
        tiles = image_tiles(inputs, family_of(self._model.model_type, where=where), self._model, where=where)
        info = item["extra_info"]
        boxes = check_boxes(info.get("boxes"), len(tiles), where=where)
        names = info.get("box_names") or [()] * len(tiles)
        images = tuple(
            SeenImage(picture, of_image, tuple(tuple(map(float, box)) for box in of_boxes), tuple(of_names))  # type: ignore[misc]
            for picture, of_image, of_boxes, of_names in zip(
                self._pictures[row], tiles, boxes or [()] * len(tiles), names, strict=True
            )
        )
        region = _region(boxes, tiles, self.request.coverage, where) if boxes else None
        return SeenPrompt(
            where=f"{where} (extra_info.index {info.get('index', 'absent')})",
            question=question_of(item["raw_prompt"]),
            images=images,
            answer=str((item.get("reward_model") or {}).get("ground_truth", "")),
            region_tokens=0 if region is None else int(region.sum()),
            region=region,
        )

    def _facts(
        self,
        n: int,
        signals: Signals,
        credit: Credit,
        reward_B: torch.Tensor,
        advantage: torch.Tensor | None,
        info: Mapping[str, Any],
    ) -> dict[str, str | float]:
        """Numbers of row n."""
        facts: dict[str, str | float] = {"reward": float(reward_B[n]), "query_row": self._seen.query_row}
        if (accuracy := number(info.get("acc"))) is not None:
            facts["accuracy"] = accuracy
        for term in credit.terms:
            if bool(term.valid[n]):
                facts[f"{term.name} (weight {term.weight:g})"] = float(term.value[n])
        if credit.trajectory_weight is not None:
            facts["trajectory_weight"] = float(credit.trajectory_weight[n])
        if advantage is not None:
            mask_T = signals.response_mask[n].bool()
            facts["advantage"] = float(advantage[n][mask_T].mean()) if mask_T.any() else 0.0
        return facts

    def _response(
        self,
        prompt: SeenPrompt,
        n: int,
        ids: Sequence[int],
        sums_V: torch.Tensor,
        signals: Signals,
        credit: Credit,
        advantage: torch.Tensor | None,
        added: torch.Tensor | None,
        facts: dict[str, str | float],
    ) -> SeenResponse:
        """Row n as a page shows it."""
        T = len(ids)
        image, region, sink = (signals[s][n, :T] for s in self._seen.masses)
        values = {"image_mass": image, "sink_mass": sink, "entropy": signals.entropy[n, :T]}
        values["log_prob"] = signals.log_probs[n, :T]
        if prompt.region_tokens:
            values["region_mass"] = region
        shown = self._seen.intervention
        if shown is not None and (prompt.region_tokens or not shown.of_boxes):
            values["effect"] = signals.log_probs[n, :T] - signals.counterfactual(shown)[n, :T]
            values["predicting_mass"] = signals[self._seen.predicting][n, :T]
        if credit.token_weight is not None:
            values["token_weight"] = credit.token_weight[n, :T]
        if added is not None:
            values["token_bonus"] = added[n, :T]
        if advantage is not None:
            values["advantage"] = advantage[n, :T]
        pieces = pieces_of(self._tokenizer, ids)
        words = words_of(pieces, special_tokens(self._tokenizer, ids))
        index_Tk, mass_Tk = signals[self._seen.top_index][n, :T].long(), signals[self._seen.top_mass][n, :T]
        maps_TV = torch.zeros(T, prompt.tokens + 1)  # the last column takes the entries of no visual token (-1)
        maps_TV.scatter_(1, torch.where(index_Tk < 0, prompt.tokens, index_Tk), mass_Tk)
        words_WV = [maps_TV[first:end, :-1].mean(0) for first, end in words]
        label = f"{self._layers}, mean over heads"
        if prompt.tokens > TOP_PATCHES:
            label += f"; of a word, the {TOP_PATCHES} most attended visual tokens of each of its tokens"
        total_1V = (sums_V / max(T, 1)).clamp(min=0)[None].numpy()
        maps = MapSet("mean", label, Packed.of(total_1V), Packed.of(torch.stack(words_WV).numpy()) if words else None)
        longest = int(self._config.data.max_response_length)
        cut = (f"The response has the largest length, {longest} tokens, and may be cut.",) if longest <= T else ()
        return SeenResponse(pieces, words, {k: v.float().numpy() for k, v in values.items()}, (maps,), facts, cut)


def _region(boxes: Sequence[Any], tiles: Sequence[tuple[Tile, ...]], coverage: float, where: str) -> np.ndarray:
    """bool [V], the visual tokens in the boxes."""
    pairs = zip(boxes, tiles, strict=True)
    return np.concatenate([box_masks(of_image, grids, coverage, where=where).any(0) for of_image, grids in pairs])


def _session(key: str) -> int:
    """The number of a rollout, of verl's key ``uid_session_index``."""
    return int(key.rsplit("_", 2)[1])
