"""Every private name of verl that this plug-in uses, with the reason, and repairs of verl.

tests/hooks/test_contract.py reads ``CONTRACT`` and compares it with the record of the installed version. A signature or
source hash that differs shows which name changed before a run fails. ``scripts/contract.sh VERSION`` does this for
another version of verl. Public API (registries, ``register_*``, configuration keys) is listed where the plug-in relies
on its behaviour.
"""

import functools
import hashlib
import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

from packaging.version import Version

from sayo_verl import __version__
from sayo_verl.errors import SayoError

SUPPORTED_VERL = ("0.9.0", "0.9.1")
WEIGHT_TRANSFER = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"
# Environment variable with the run's token, which the launcher creates and all processes of the run share.
RUN_TOKEN = "SAYO_RUN_TOKEN"


@dataclass(frozen=True)
class Seam:
    """One name of verl, its use and the behaviour that the plug-in expects.

    Attributes:
        path: ``module:attribute``.
        use: ``overrides``, ``calls``, ``replaces`` or ``relies on``.
        why: the expected behaviour.
        since, until: first and last version of verl that has the name; empty: any.
    """

    path: str
    use: str
    why: str
    since: str = ""
    until: str = ""

    def applies(self, verl: str) -> bool:
        """Whether this version of verl has the name."""
        own = Version(verl)
        return (not self.since or own >= Version(self.since)) and (not self.until or own <= Version(self.until))

    def resolve(self) -> Any:
        module, attribute = self.path.split(":")
        target = importlib.import_module(module)
        for part in attribute.split("."):
            target = inspect.getattr_static(target, part) if inspect.isclass(target) else getattr(target, part)
        return target.__func__ if isinstance(target, classmethod | staticmethod) else target

    def signature(self) -> str:
        """Parameters with annotations and defaults; empty for what has none that Python knows."""
        try:
            return str(inspect.signature(self.resolve()))
        except ValueError:
            return ""

    def source_hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the source without indentation and trailing blanks."""
        lines = inspect.getsource(self.resolve()).splitlines()
        return hashlib.sha256("\n".join(line.strip() for line in lines).encode()).hexdigest()[:12]


CONTRACT = (
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer.__init__", "overrides", "reads trainer.v1.trainer_mode once"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup", "overrides", "builds workers; the handshake follows it"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_old_log_prob", "overrides",
         "one compute_log_prob call with batch.extra_info; entropy comes back sliced to the response"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_ref_log_prob", "relies on",
         "must not have the probe request"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_advantage", "overrides",
         "pads with to_padded_tensor in batch.keys order and calls the registered estimator"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._step_once", "overrides",
         "old_log_prob comes before advantage; nothing before it lets the rollout engine sleep"),
    # Rollouts that repeat (sayo_verl/hooks/repeat.py)
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._fetch_one_gen_batch", "overrides",
         "every training row comes through it, extra_info as in the data set; names each prompt by a random uid; "
         "a step may fetch several times"),
    # The watchdog (sayo_verl/hooks/phases.py, watchdog.py, reward_limit.py)
    Seam("verl.utils.debug:marked_timer", "overrides",
         "wraps each phase of a step, by the names that phase_names.PHASES knows; imported into each trainer's module"),
    Seam("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._sync_metadata_from_transfer_queue", "overrides",
         "called in each poll while the trainer waits for rollouts"),
    Seam("verl.experimental.reward_loop.reward_loop:RewardLoopWorker._init_reward_fn", "overrides",
         "builds the reward manager of a worker, with compute_score and is_async_reward_score"),
    Seam("verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.get_server_address", "calls",
         "address of vLLM's HTTP server, whose /health asks the engine"),
    # Recorded rollouts (sayo_verl/hooks/record.py)
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer.fit", "overrides",
         "counts global_steps past the last step; ends without on_train_end after it"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer.step", "overrides",
         "starts while the rollout engine is awake with the weights of the step before"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._validate", "overrides",
         "how prompts of the partition val are submitted, awaited and cleared; returns the metrics"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch", "overrides",
         "follows the sampling of a batch, and depends on its order; _dispatch_info of the worker group"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_reward_colocate", "calls",
         "rewards of any partition; a reward model without its own devices passes only raw_prompt to the function"),
    Seam("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__._run_prompt", "relies on",
         "validate selects the partition val; __rollout_n__ and agent_name of a row are read"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop", "overrides",
         "looks agent_name up in _agent_loop_registry and gives sampling parameters and the row's fields to run; an "
         "exception is a failed session"),
    Seam("verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size", "calls", "pads in the batch's partition"),
    Seam("verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync", "overrides", "base of the sayo_sync mode"),
    Seam("verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync", "overrides",
         "base of the sayo_colocate_async mode; overrides none of the four methods"),
    Seam("verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync.__init__", "overrides",
         "base of the sayo_separate_async mode; its assertions are in launch/mode_check.py"),
    Seam("verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync._setup", "overrides",
         "calls the base class's, so the handshake precedes the rollouts; logs with flush=True, which fails"),
    Seam("verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync._compute_old_log_prob", "relies on",
         "restores the weights of the step's first update around the base class's method"),
    Seam("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__._agent_loop_postprocess", "relies on",
         "tags rows with the first and the last version of the weights that generated them"),
    Seam("verl.trainer.ppo.v1.utils:MetricsAggregator", "relies on",
         "the name of a metric decides how it is reduced over the updates of a step"),
    Seam("verl.experimental.separation.engine_workers:DetachActorWorker", "relies on",
         "keeps the actor in .actor as ActorRolloutRefWorker does; saves and restores its weights"),
    Seam("verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate", "relies on",
         "resumes an interrupted response; keeps the first and the last version of the weights"),
    Seam("verl.checkpoint_engine.base:CheckpointEngineManager.update_weights", "relies on",
         "prepare, build_topology, init_process_group, send beside receive, finalize; only on the CPU stack"),
    Seam("verl.checkpoint_engine.base:CheckpointEngineRegistry.get", "calls",
         "raises ValueError with the import errors of its backends"),
    Seam("verl.utils.fsdp_utils:fsdp2_sharded_save_to_cpu", "replaces",
         "returns the weights themselves, not copies, where they are on the CPU"),
    Seam("verl.trainer.ppo.v1.utils:compute_advantage_for_multi_trajectories", "relies on",
         "passes every row to non-GRPO estimators"),
    Seam("verl.trainer.ppo.ray_trainer:compute_advantage", "relies on", "the keyword arguments an estimator gets"),
    Seam("verl.trainer.ppo.core_algos:compute_grpo_outcome_advantage", "relies on", "arithmetic of group_advantage"),
    Seam("verl.trainer.ppo.padding_utils:construct_minimal_padding_template", "relies on",
         "padding rows: no image, mask 0, tag is_padding, but boxes copied from a real row"),
    Seam("verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.forward_step", "overrides",
         "returns (loss, {'model_output', ...}) for one micro-batch"),
    Seam("verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_inputs", "relies on",
         "rows packed back to back or padded on the right"),
    Seam("verl.workers.engine.utils:postprocess_batch_func", "relies on",
         "keeps every jagged key of model_output and restores row order"),
    Seam("verl.workers.engine.base:EngineRegistry.get_engine_cls", "relies on", "(device, vendor) before device"),
    Seam("verl.workers.utils.padding:response_from_nested", "calls", "token t from position P + t - 1"),
    Seam("verl.workers.utils.padding:response_to_nested", "calls", "inverse of padding"),
    Seam("verl.utils.transferqueue_utils:tqbridge", "relies on",
         "stores every tensor of a worker's output under its key and passes extra_info into the worker's batch"),
    Seam("verl.trainer.main_ppo:run_ppo", "calls",
         "initialises Ray with runtime_env, then calls remote() of the class of the task runner"),
    Seam("verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__", "overrides", "the plain class behind the actor"),
    Seam("verl.single_controller.ray.base:create_colocated_worker_cls", "relies on",
         "actors keep their workers in worker_dict"),
    Seam("verl.utils.tensordict_utils:maybe_fix_3d_position_ids", "replaces", "verl issue 7899"),
    Seam("verl.utils.tensordict_utils:get_non_tensor_data", "calls", "reads per-call settings"),
    Seam("verl.utils.tensordict_utils:assign_non_tensor_stack", "calls", "changed images of a micro-batch"),
    Seam("verl.utils.tracking:FileLogger", "relies on", "metrics.jsonl and VERL_FILE_LOGGER_PATH"),
    # Resuming (sayo_verl/launch/resume.py)
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._load_checkpoint", "relies on",
         "where each resume_mode looks; silent if the tracker or data.pt is missing"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint", "overrides",
         "actor, critic, data.pt, transfer_queue, and the tracker last, in place; guarded in hooks/fingerprint.py and "
         "hooks/save_errors.py"),
    Seam("verl.utils.checkpoint.checkpoint_manager:find_latest_ckpt_path", "relies on", "how a tracker is read"),
    Seam("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.load_checkpoint", "relies on",
         "names of the files per state, world size and rank; loads load_contents and nothing else"),
    Seam("verl.trainer.ppo.utils:need_critic", "calls", "whether a checkpoint has a critic"),
    Seam("verl.trainer.ppo.reward:get_custom_reward_fn", "relies on", "reward_kwargs reach the reward function"),
    Seam("verl.trainer.ppo.reward:_call_with_kwargs", "relies on",
         "our reward function has no **kwargs; it gets verl's keywords and reward_kwargs only"),
    Seam("verl.experimental.reward_loop.reward_manager.registry:get_reward_manager_cls", "relies on",
         "its registry REWARD_MANAGER has the valid values of reward.reward_manager.name"),
    Seam("verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager.run_single", "relies on",
         "the keywords of a reward function; the response is decoded without special tokens; an error reaches the row; "
         "acc is the score of a function that returns a number; reads compute_score and is_async_reward_score at each "
         "call"),
    Seam("verl.experimental.reward_loop.reward_loop:RewardLoopWorker.compute_score_disrm", "relies on",
         "a reward model gives reward_score and no reward_extra_info"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_score", "overrides",
         "sets reward_score of the last output; fails if reward_extra_info is missing (reward model on own devices)"),
    Seam("verl.utils.reward_score:default_compute_score", "calls", "verl's rules by data source, tried before the run"),
    Seam("verl.experimental.reward_loop.reward_manager.limited:RateLimitedRewardManager.run_single", "relies on",
         "turns errors into reward 0, so it is refused"),
    Seam("verl.experimental.reward_loop.reward_loop:migrate_legacy_reward_impl", "relies on",
         "the earlier names of reward keys; verl.trainer.main_ppo does not call it"),
    Seam("verl.utils.import_utils:load_module", "calls", "loads a reward function as a run does"),
    Seam("verl.utils.tokenizer.chat_template:apply_chat_template", "calls", "renders the generation prompt"),
    Seam("verl.utils.tokenizer.tokenizer:hf_tokenizer", "calls", "the tokenizer of rollouts and of the reward loop"),
    Seam("verl.utils.device:get_device_id", "calls", "where a micro-batch is computed, also with offloaded parameters"),
    Seam("verl.utils.ulysses:get_ulysses_sequence_parallel_group", "calls", "the ranks that share a sequence"),
    Seam("verl.utils.ulysses:get_ulysses_sequence_parallel_rank", "calls", "which slice of the packed tokens is here"),
    Seam("verl.utils.ulysses:get_ulysses_sequence_parallel_world_size", "calls", "1 without sequence parallelism"),
    Seam("verl.models.transformers.monkey_patch:patch_vlm_for_ulysses_input_slicing", "relies on",
         "the decoder gets a contiguous slice of the packed tokens; padding comes last"),
    Seam("verl.models.transformers.monkey_patch:_ulysses_flash_attention_forward", "relies on",
         "exchanges heads for tokens after queries and keys were rotated"),
    Seam("verl.models.transformers.qwen2_vl:qwen2_vl_attn_forward", "relies on",
         "calls qwen2_vl's apply_multimodal_rotary_pos_emb, looked up at each call, with all heads"),
    # Weights from the trainer to vLLM
    Seam(f"{WEIGHT_TRANSFER}:BucketedWeightSender.__init__", "overrides", "takes the address of the socket"),
    Seam(f"{WEIGHT_TRANSFER}:BucketedWeightSender._init_socket", "relies on",
         "deletes an existing file at the address before it binds"),
    Seam(f"{WEIGHT_TRANSFER}:BucketedWeightReceiver.__init__", "overrides", "takes the address of the socket"),
    Seam("verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter.__init__", "relies on",
         "builds the sender's address from Ray's job id, which is 01000000 in every Ray that a job starts"),
    Seam("verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension._get_zmq_handle", "relies on",
         "builds the same address for the receiver"),
    # One TransferQueue per job (sayo_verl/hooks/queue_name.py)
    Seam("transfer_queue.interface:_init_from_existing", "overrides",
         "ray.get_actor by a fixed name and namespace; joins the queue of another job on the cluster"),
    Seam("transfer_queue.interface:init", "overrides",
         "TransferQueueController.options(name=..., namespace=...), the namespace a keyword"),
    Seam("transfer_queue.interface:close", "relies on", "kills the controller, also one that another job uses"),
    # Sampling
    Seam("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.__init__", "overrides",
         "poll_interval has no configuration key; only with VERL_PLATFORM=cpu"),
    Seam("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._evict_terminal_groups", "overrides",
         "called at each poll of both buffers; the last of its reasons counts filtered groups by their value"),
    Seam("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._materialize_batch", "overrides",
         "called once a batch, at the end of sample()"),
    # first causes (sayo_verl/hooks: rollout_errors, bad_images, skipped_updates, step_guard, save_errors)
    Seam("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.sample", "relies on",
         "raises RuntimeError 'no materializable trajectories' if every rollout of a batch failed"),
    Seam("verl.workers.engine.fsdp.transformer_impl:FSDPEngine.optimizer_step", "overrides",
         "returns the norm of the gradients as a number, and skips the update if it is not finite"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._build_replay_buffer", "overrides",
         "gives group filtering to its own buffers, not to a custom sampler"),
    # Other families (sayo_verl/models)
    Seam("verl.models.transformers.qwen2_vl:_get_input_embeds", "replaces",
         "image-free micro-batches of Qwen2.5-VL crash on transformers 5"),
    Seam("verl.workers.config.model:hf_processor", "replaces",
         "its only caller in workers, agent loop and server; returns None for an unknown processor"),
    Seam("verl.workers.rollout.utils:qwen2_5_vl_dedup_image_tokens", "replaces",
         "every prompt passes through it to vLLM, with the processor of HFModelConfig"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_multi_modal_inputs", "relies on",
         "calls the processor with text decoded without special tokens; keeps all but input_ids and attention_mask"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_position_ids", "relies on",
         "1-D positions for a processor without get_rope_index"),
    Seam("verl.utils.tokenizer.continuous_token:VLContinuousTokenMixin.render_tokens_with_mm", "relies on",
         "renders a prompt with the processor's chat template and takes its input_ids", since="0.9.1"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopBase.apply_chat_template", "relies on",
         "renders a prompt with images as render_tokens_with_mm does later; refuses it over rollout.prompt_length",
         until="0.9.0"),
    # sayo inspect (sayo_verl/inspection/model_view.py, sayo_verl/models/processors.py)
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset._build_messages", "calls",
         "a row's prompt with its images in place of the tags, as rollouts get it"),
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset._download", "overrides", "nothing to fetch for a single row"),
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset._read_files_and_tokenize", "overrides", "no file is read"),
    Seam("verl.utils.tokenizer:build_multimodal_processor_inputs", "calls", "the processor's call of rollouts"),
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset._process_multi_modal_info", "overrides",
         "images of a prompt, for rollouts and the length filter"),
    # checks of data before a run (sayo_verl/data, data_check.py, prompt_check.py)
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset.__init__", "relies on",
         "apply_chat_template_kwargs and mm_processor_kwargs of the configuration"),
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset.__getitem__", "overrides",
         "extra_info is a dict or null; opens images and does not decode them"),
    Seam("verl.utils.dataset.rl_dataset:RLHFDataset.maybe_filter_out_long_prompts", "relies on",
         "drops prompts over data.max_prompt_length and those that raise, only with data.filter_overlong_prompts"),
    Seam("verl.trainer.ppo.v1.trainer_base:PPOTrainer._init_dataloader", "overrides",
         "always opens validation files; drops an incomplete last batch; sets train_dataset"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopBase.ct_build_initial_tokens", "relies on",
         "refuses a prompt with images over rollout.prompt_length, and cuts a text-only prompt", since="0.9.1"),
    Seam("verl.experimental.agent_loop.agent_loop:AgentLoopBase._cap_text_prompt_length", "relies on",
         "cuts a text-only prompt"),
    Seam("verl.utils.model:extract_multi_modal_inputs", "relies on",
         "concatenates every key of multi_modal_inputs over rows and passes it to the model"),
    Seam("verl.models.transformers.dense_common:forward_with_torch_backend", "relies on",
         "drops pixel values, so fused kernels are refused for InternVL"),
    Seam("verl.plugin.platform:PlatformRegistry.register", "calls", "the CPU platform"),
)  # fmt: skip


def require_supported_verl() -> None:
    """Refuse a verl version that the contract does not cover; ``SAYO_ALLOW_VERL=<version>`` allows one version.

    Raises:
        SayoError: X01.
    """
    found = version("verl")
    if found not in SUPPORTED_VERL and os.environ.get("SAYO_ALLOW_VERL") != found:
        raise SayoError(
            "X01",
            "this version of verl is not supported",
            where="import verl",
            got=found,
            wanted=" or ".join(SUPPORTED_VERL),
            fix=f"pip install verl=={SUPPORTED_VERL[-1]}, or run `bash scripts/contract.sh {found}` and set "
            f"SAYO_ALLOW_VERL={found} if what changed is compatible",
        )


def worker_report(actor: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Report what a worker actor of verl runs; the launch handshake executes this inside the actor.

    Args:
        actor: the colocated worker actor (it keeps its workers in ``worker_dict``).
        request: the request of the run's method, from ``StatisticsRequest.to_wire``.

    Returns:
        version of sayo-verl there, names of the engine's classes, number of decoder layers, the requested layers
        counted from 0, the probe's path and its largest difference from the reference path, Ray's id of the node, pid.

    Raises:
        SayoError: L18 and P02 for a model family that cannot be probed, C10 for packed rows that it cannot run, P03 and
            P11 for a layer that is missing or has no full attention, P16, P17, P24, P29 and P31 for a path that cannot
            run or is wrong here.
    """
    import ray
    import torch
    from verl.utils.device import get_device_id

    from sayo_verl.models.families import family_of
    from sayo_verl.models.qwen3_5 import check_packed_model
    from sayo_verl.probe.selfcheck import check_path
    from sayo_verl.probe.statistics import StatisticsRequest
    from sayo_verl.probe.taps import asked_layers, text_attention_layers

    # A critic is no such worker, and a reference worker of its own has no actor.
    (engine,) = (w.actor.engine for w in actor.worker_dict.values() if getattr(w, "actor", None) is not None)
    wanted, where = StatisticsRequest.from_wire(request), "algorithm.attn.*.layers"
    family_of(engine.model_config.hf_config.model_type, where="the loaded model")
    check_packed_model(engine.module, packed=engine.model_config.use_remove_padding)
    _, n_layers = text_attention_layers(engine.module)
    layers = asked_layers(engine.module, wanted.layers, where=where)
    text = engine.model_config.hf_config.get_text_config()
    path, difference = check_path(
        wanted.path,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=text.head_dim if "head_dim" in text.to_dict() else text.hidden_size // text.num_attention_heads,
        device=torch.device(get_device_id()),
    )
    return {
        "version": __version__,
        "engine_bases": [c.__name__ for c in type(engine).__mro__[:-1]],
        "n_layers": n_layers,
        "layers": sorted(set(layers.values())),
        "path": path,
        "path_difference": difference,
        "node": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
    }


def guard_equal_length_mrope() -> None:
    """Repair verl issue 7899, on every device: mRoPE position ids of a batch of equally long sequences.

    All sequences of a batch are equally long in a batch of one, or when all responses to same-size prompts hit the
    limit. TransferQueue then returns the (4, L) position ids ragged over the component dimension, with values
    (B * 4, L) instead of (4, B * L). verl's ``maybe_fix_3d_position_ids`` only relabels the dimension, and the update
    fails in ``split_with_sizes``. The replacement rebuilds the layout in that case and calls verl's function otherwise.
    """
    import torch
    import verl.utils.tensordict_utils as tu

    original = tu.maybe_fix_3d_position_ids

    def maybe_fix_3d_position_ids(data: Any) -> None:
        ids = data["position_ids"] if "position_ids" in data.keys() else None
        if isinstance(ids, torch.Tensor) and ids.is_nested and ids.dim() == 3:
            values, offsets = ids.values(), ids.offsets()  # type: ignore[attr-defined]
            rows, last = offsets.numel() - 1, int(offsets[-1])
            if last == values.shape[0] and last != values.shape[1]:
                fixed = tu.nested_tensor_from_tensor_list(
                    list(values.view(rows, values.shape[0] // rows, values.shape[1]).unbind(0)), ragged_idx=2
                )
                if data.is_locked:
                    with data.unlock_():
                        data["position_ids"] = fixed
                else:
                    data["position_ids"] = fixed
                return
        original(data)

    tu.maybe_fix_3d_position_ids = maybe_fix_3d_position_ids


def guard_saved_weights(fsdp_utils: Any) -> None:
    """Copy the weights that ``separate_async`` saves for the old policy, where verl returns the weights themselves.

    ``fsdp2_sharded_save_to_cpu`` calls ``.cpu()``, which copies from an accelerator only. Weights that are on the CPU,
    through offloading or on the CPU platform, are returned as they are. The next update or restore then changes them:
    the old policy becomes the current one, or the current one is lost, without an error.

    Args:
        fsdp_utils: ``verl.utils.fsdp_utils``, just imported.
    """
    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    @functools.wraps(original)
    def fsdp2_sharded_save_to_cpu(model: Any) -> tuple[dict[str, tuple[Any, Any]], Any]:
        state, spec = original(model)
        of_rank = {name: getattr(param, "_local_tensor", param) for name, param in model.named_parameters()}
        on_cpu = {name for name, tensor in of_rank.items() if tensor.device.type == "cpu"}
        return {name: (saved.clone() if name in on_cpu else saved, of) for name, (saved, of) in state.items()}, spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu


def guard_weight_socket(transfer: ModuleType) -> None:
    """Separate the weights of two jobs on one machine.

    verl sends weights to vLLM through a socket in /tmp that is named after Ray's job id. The sender deletes an existing
    socket. Every job that starts its own Ray has the id 01000000. So one of two such jobs hangs, or its rollouts get
    the other's weights. Here both ends add the run's token to the address. The launcher creates the token and passes it
    to all processes of the run. Without a token the address stays verl's.

    Args:
        transfer: the module ``WEIGHT_TRANSFER``, just imported.
    """

    def own_address(cls: Any) -> None:
        original = cls.__init__

        @functools.wraps(original)
        def __init__(self: Any, zmq_handle: str, *args: Any, **kwargs: Any) -> None:
            token = os.environ.get(RUN_TOKEN)
            if token and zmq_handle.startswith("ipc://"):
                zmq_handle = f"{zmq_handle}-{token}"
            original(self, zmq_handle, *args, **kwargs)

        cls.__init__ = __init__

    own_address(transfer.BucketedWeightSender)
    own_address(transfer.BucketedWeightReceiver)
