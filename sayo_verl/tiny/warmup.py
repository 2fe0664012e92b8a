"""Supervised warm-up of the tiny policy, which reinforcement learning then starts from.

The policy learns to write ``<think> circle red .</think><answer> red</answer>``. It may first name other objects, or
name only another object and still answer correctly. So the policy chooses which objects it names, and a reward on
attention can change this choice. Training stops by accuracy, not by steps, because the rise from chance is steep and a
policy that is always correct has nothing to learn.

The warm-up also teaches the policy not to write an image placeholder or another special token. After random
initialisation each keeps a probability of about 1e-7 per token. One placeholder in some 50 000 sampled tokens would be
an image token without an image, which stops a training run.

Shape suffixes: B rows, S sequence, V vocabulary.
"""

import random
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import BatchFeature, PreTrainedModel, Qwen3VLProcessor

from sayo_verl.errors import SayoError
from sayo_verl.reward import compute_score
from sayo_verl.scenes import Scene, SceneConfig, sample_scene
from sayo_verl.tiny.policy import END, SPECIAL_TOKENS, TinyPolicyConfig, build_model, build_processor, generate
from sayo_verl.tiny.prepared import Prepared, content_hash, prepare_folder

WARMUP_VERSION = 1
IGNORE = -100  # the label that the loss skips


@dataclass(frozen=True)
class WarmupConfig:
    """Settings of the warm-up.

    Attributes:
        learning_rate, beta2, weight_decay, clip: AdamW and the gradient norm limit.
        warmup_steps: steps of linear rise of the learning rate; constant afterwards.
        batch_size: new scenes per step.
        forbid_weight, forbid_log_prob: weight and limit of the loss on the total log probability of all special tokens
            except the end token.
        target_only, others_then_target: shares of responses that name only the target, and one or two other objects
            before it; the rest name only one other object. The answer is correct in all of them.
        min_objects: minimum number of objects in warm-up scenes, which may be easier than those of the task.
        accuracy_target, format_target: stop at these greedy rates on held-out scenes of the task.
        accuracy_floor: a policy with a lower final accuracy is refused.
        eval_every, eval_scenes: steps between evaluations, scenes in each.
        max_new_tokens: longest response in an evaluation.
        max_steps: upper limit of steps.
        threads: of torch while training; results are the same for the same number of threads.
        seed: of the scenes and responses (the initial weights have their own).
    """

    learning_rate: float = 1.5e-3
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 50
    batch_size: int = 32
    forbid_weight: float = 0.01
    forbid_log_prob: float = -30.0
    target_only: float = 0.4
    others_then_target: float = 0.3
    min_objects: int = 1
    accuracy_target: float = 0.65
    format_target: float = 0.97
    accuracy_floor: float = 0.5
    eval_every: int = 75
    eval_scenes: int = 256
    max_new_tokens: int = 24
    max_steps: int = 2000
    threads: int = 1
    seed: int = 0


def prompt_messages(question: str) -> list[dict[str, Any]]:
    """The messages that verl builds from a row's prompt ``"<image>" + question``."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def response_text(named: Sequence[tuple[str, str]], answer: str) -> str:
    """Return a response that names objects as (key word, attribute) and answers, without the end token."""
    thought = "".join(f" {key} {attribute} ." for key, attribute in named)
    return f"<think>{thought}</think><answer> {answer}</answer>"


def sample_response(rng: random.Random, scene: Scene, config: WarmupConfig) -> str:
    """Return one correct response that names random objects, in the shares of ``config``."""
    others = [i for i in range(len(scene.objects)) if i != scene.target]
    draw = rng.random()
    if draw < config.target_only or not others:
        named = [scene.target]
    elif draw < config.target_only + config.others_then_target:
        named = [*rng.sample(others, min(len(others), rng.randint(1, 2))), scene.target]
    else:
        named = [rng.choice(others)]
    return response_text([(scene.key_word(i), scene.attribute(i)) for i in named], scene.answer)


def prompt_batch(processor: Qwen3VLProcessor, questions: Sequence[str], images: Sequence[Any]) -> BatchFeature:
    """Model inputs [B, S] of prompts with one image each, padded on the left for generation."""
    texts = [
        processor.apply_chat_template(prompt_messages(question), add_generation_prompt=True, tokenize=False)
        for question in questions
    ]
    return processor(text=texts, images=list(images), padding=True, padding_side="left", return_tensors="pt")


def training_batch(
    processor: Qwen3VLProcessor, scenes: Sequence[Scene], responses: Sequence[str]
) -> tuple[BatchFeature, torch.Tensor]:
    """Build sequences of prompt and response, padded on the right.

    Returns:
        Model inputs [B, S], and labels [B, S]: the response's tokens and the end token, ``IGNORE`` elsewhere.
    """
    ended = [response + END for response in responses]
    texts = [
        processor.apply_chat_template(prompt_messages(s.question), add_generation_prompt=True, tokenize=False) + text
        for s, text in zip(scenes, ended, strict=True)
    ]
    inputs = processor(
        text=texts, images=[s.image for s in scenes], padding=True, padding_side="right", return_tensors="pt"
    )
    labels_BS = torch.full_like(inputs["input_ids"], IGNORE)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, ids in enumerate(processor.tokenizer(ended)["input_ids"]):
        # Every response starts with a tag, so the prompt's last token never merges with the response's first.
        labels_BS[row, lengths[row] - len(ids) : lengths[row]] = torch.tensor(ids)
    if not torch.equal(inputs["input_ids"][labels_BS != IGNORE], labels_BS[labels_BS != IGNORE]):
        raise AssertionError("a response is tokenised differently alone and after its prompt")
    return inputs, labels_BS


def warm_up_loss(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, forbidden: Sequence[int], config: WarmupConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the labelled tokens, and the excess (in nats) of the forbidden ones over their limit."""
    predicted_NV = logits_BSV[:, :-1][labels_BS[:, 1:] != IGNORE].float()  # N: all labelled tokens of the batch
    cross_entropy = torch.nn.functional.cross_entropy(predicted_NV, labels_BS[:, 1:][labels_BS[:, 1:] != IGNORE])
    log_p_N = predicted_NV[:, list(forbidden)].logsumexp(-1) - predicted_NV.logsumexp(-1)
    return cross_entropy, (log_p_N - config.forbid_log_prob).clamp(min=0).mean()


def greedy_rates(
    model: PreTrainedModel,
    processor: Qwen3VLProcessor,
    scenes: Sequence[Scene],
    max_new_tokens: int,
) -> tuple[float, float]:
    """Shares of scenes with a correct and with a well-formed greedy response, by the reward function."""
    inputs = prompt_batch(processor, [s.question for s in scenes], [s.image for s in scenes])
    ids_BS = generate(model, inputs, max_new_tokens=max_new_tokens, temperature=0.0)
    texts = processor.tokenizer.batch_decode(ids_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [compute_score("sayo/scenes", text, s.answer) for text, s in zip(texts, scenes, strict=True)]
    return sum(score["acc"] for score in scores) / len(scores), sum(score["format"] for score in scores) / len(scores)


@contextmanager
def _torch_threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up(
    model: PreTrainedModel,
    processor: Qwen3VLProcessor,
    config: WarmupConfig,
    scene_config: SceneConfig,
) -> dict[str, Any]:
    """Train ``model`` in place until its greedy accuracy reaches the target.

    Args:
        scene_config: scenes of the task; training and evaluation scenes come from separate random streams.

    Returns:
        ``steps``, ``seconds``, final greedy ``accuracy`` and ``format`` rate, and ``history``: triples (step, mean
        cross-entropy since the last evaluation, accuracy).

    Raises:
        SayoError: T01 when the accuracy is below the floor after ``max_steps``.
    """
    start = time.perf_counter()
    rng = random.Random(f"warm-up/{config.seed}")
    easy = replace(scene_config, min_objects=min(config.min_objects, scene_config.min_objects))
    held_out_rng = random.Random(f"warm-up held-out/{config.seed}")
    held_out = [sample_scene(held_out_rng, scene_config) for _ in range(config.eval_scenes)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    forbidden = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS if token != END]
    history: list[tuple[int, float, float]] = []
    losses: list[float] = []
    done = False
    columns = (TextColumn("warm-up"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _torch_threads(config.threads), Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=config.max_steps)
        for step in range(1, config.max_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, step / config.warmup_steps)
            scenes = [sample_scene(rng, easy) for _ in range(config.batch_size)]
            inputs, labels_BS = training_batch(processor, scenes, [sample_response(rng, s, config) for s in scenes])
            model.train()
            loss, excess = warm_up_loss(model(**inputs).logits, labels_BS, forbidden, config)
            optimizer.zero_grad()
            (loss + config.forbid_weight * excess).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            losses.append(loss.item())
            if step % config.eval_every == 0 or step == config.max_steps:
                model.eval()
                accuracy, well_formed = greedy_rates(model, processor, held_out, config.max_new_tokens)
                history.append((step, sum(losses) / len(losses), accuracy))
                losses.clear()
                done = accuracy >= config.accuracy_target and well_formed >= config.format_target
            shown = f", accuracy {history[-1][2]:.2f}" if history else ""
            progress.update(bar, advance=1, description=f"step {step}, loss {loss.item():.3f}{shown}")
            if done:
                break
    model.eval()
    accuracy = history[-1][2]
    if accuracy < config.accuracy_floor:
        raise SayoError(
            "T01",
            "the tiny policy did not learn to use the image",
            where="warm-up of the tiny policy",
            got=f"greedy accuracy {accuracy:.2f} after {config.max_steps} steps",
            wanted=f"at least {config.accuracy_floor}",
            fix="choose another seed of TinyPolicyConfig or WarmupConfig, or raise max_steps",
        )
    seconds = time.perf_counter() - start
    return {"steps": step, "seconds": seconds, "accuracy": accuracy, "format": well_formed, "history": history}


def policy_hash(policy: TinyPolicyConfig, warmup: WarmupConfig, scenes: SceneConfig) -> str:
    """Ten hexadecimal digits, independent of settings of ``scenes`` that do not change the drawing."""
    drawn = replace(scenes, n_train=1, n_val=1, seed=0, region="target")
    return content_hash(policy.config_hash(), asdict(warmup), WARMUP_VERSION, asdict(drawn))


def prepare_policy(
    out_root: Path | str, policy: TinyPolicyConfig, warmup: WarmupConfig, scenes: SceneConfig
) -> Prepared:
    """Make ``out_root/policy-<hash>/``, a warmed-up checkpoint for ``from_pretrained``, with ``manifest.json``.

    A complete folder of the same configuration is reused; training takes one to two and a half minutes on one core.

    Raises:
        SayoError: T01 when the warm-up misses its accuracy floor, D84 for another task than drawn scenes.
    """
    if policy.task != "scenes":
        raise SayoError(
            "D84",
            "the warm-up demonstrates answers about drawn scenes only",
            where="TinyPolicyConfig.task",
            got=repr(policy.task),
            wanted="'scenes'",
            fix="leave task as it is; for walks build the policy with build_model and train it on demonstration()",
        )

    def build(folder: Path) -> dict[str, Any]:
        processor = build_processor(policy)
        model = build_model(policy, processor)
        result = warm_up(model, processor, warmup, scenes)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        configs = {"policy": asdict(policy), "warmup": asdict(warmup), "scenes": asdict(scenes)}
        return {"config": configs, "warmup": result}

    folder = Path(out_root) / f"policy-{policy_hash(policy, warmup, scenes)}"
    return prepare_folder(folder, "tiny policy", build)
