"""A tiny but real Qwen3-VL or Qwen3.5, built offline: configuration, weights, tokenizer, processor and chat template.

All parts are ordinary transformers objects that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load. The
tokenizer is byte-level BPE, so it encodes any text. Its merges are trained on the words of the task, so that each of
these words is one token in its form in a text.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sayo_verl.errors import SayoError
from sayo_verl.scenes import QUESTIONS
from sayo_verl.scenes.drawing import COLOURS, SHAPES
from sayo_verl.scenes.walk_truth import ANSWER, COMMA, DIRECTIONS, FILLERS, MAX_GRID, cell_names
from sayo_verl.tiny.prepared import content_hash

PAD, END = "<|endoftext|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", END, VISION_START, VISION_END, IMAGE, VIDEO)
# Tags are not special tokens, because a reward function must find them in a response decoded without special tokens.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- else -%}{{- raise_exception('unknown content type: ' + part.type) -}}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
_WORD_ENDS = "?."
Task = Literal["scenes", "walk"]


@dataclass(frozen=True)
class TinyPolicyConfig:
    """Family and sizes of the tiny policy.

    Attributes:
        task: whose words are single tokens, drawn scenes or walks (``sayo_verl.scenes.walk``).
        family: ``qwen3_vl``, or ``qwen3_5``, whose layers but the last have linear attention and which has no
            deepstack.
        hidden_size, layers, heads, kv_heads, head_dim, intermediate_size: the text model.
        vision_hidden_size, vision_depth, vision_heads: the vision tower; its MLP is twice as wide as its hidden size.
        deepstack: vision blocks whose output is also added to the first text layers.
        patch_size: pixels per patch side; a visual token covers 2 x 2 patches.
        initializer_range: standard deviation of the initial weights. With the usual 0.02 a model of this size did not
            learn to use the image.
        max_positions: longest sequence, in tokens.
        seed: of the initial weights.
    """

    family: Literal["qwen3_vl", "qwen3_5"] = "qwen3_vl"
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    vision_hidden_size: int = 64
    vision_depth: int = 2
    vision_heads: int = 2
    deepstack: tuple[int, ...] = (0,)
    patch_size: int = 16
    initializer_range: float = 0.08
    max_positions: int = 1024
    seed: int = 0
    task: Task = "scenes"

    def config_hash(self) -> str:
        """Ten hexadecimal digits, equal for equal initial weights, tokenizer, processor and template."""
        values = asdict(self)
        if self.family == "qwen3_vl":  # folders that were made before there was a choice keep their names
            del values["family"]
        if self.task == "scenes":
            del values["task"]
        return content_hash("policy", values, CHAT_TEMPLATE, SPECIAL_TOKENS, TAGS, task_words(self.task))


def task_words(task: Task = "scenes") -> tuple[str, ...]:
    """Every word and mark of a task in its form in a text, with its leading space if it has one."""
    ends = ("system", "user", "assistant", "\n")
    if task == "walk":
        asked = ("at", "Walk", *map(str, range(1, MAX_GRID**2)), "steps", ".")
        said = (*FILLERS, *cell_names(MAX_GRID), *DIRECTIONS, COMMA, ANSWER)
        return ("Start", *(f" {word}" for word in (*asked, *said)), *ends)
    words = [f" {word}" for word in (*SHAPES, *COLOURS)] + [" ."]
    for question in QUESTIONS.values():
        pieces = question.rstrip(_WORD_ENDS).split(" ")
        words += [piece if i == 0 else f" {piece}" for i, piece in enumerate(pieces) if piece != "{key}"]
        words.append(question[-1])
    return tuple(dict.fromkeys([*words, *ends]))


def build_tokenizer(task: Task = "scenes") -> Qwen2Tokenizer:
    """Build a byte-level BPE tokenizer in which every word of a task is one token.

    Raises:
        SayoError: T02 when the trained merges split a word.
    """
    trained = Tokenizer(models.BPE())
    # The trainer gets words one by one, so only the byte alphabet of the real pre-tokenizer is needed here.
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = task_words(task)
    # Qwen's pre-tokenizer cuts before every digit, so no merge makes one token of a word with a digit.
    whole = [word for word in words if any(map(str.isdigit, word))]
    trained.train_from_iterator([word for word in words if word not in whole], trainer)
    bpe = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in bpe["merges"]]  # transformers declares strings, tokenizers needs pairs
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (END, PAD)],
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (*TAGS, *whole)])
    tokenizer.chat_template = CHAT_TEMPLATE
    split = [word for word in task_words(task) if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if split:
        raise SayoError(
            "T02",
            "words of the task are not single tokens",
            where="tiny policy tokenizer",
            got=split,
            wanted="one token each",
            fix="install the version of tokenizers that pyproject.toml names",
        )
    return tokenizer


def build_processor(config: TinyPolicyConfig) -> Qwen3VLProcessor:
    """Build tokenizer, image processor and chat template; image sides that are multiples of a visual token are kept."""
    side = config.patch_size * MERGE_SIZE
    sizes = {"patch_size": config.patch_size, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE}
    half = [0.5, 0.5, 0.5]
    limits = {"shortest_edge": side**2, "longest_edge": (8 * side) ** 2}  # in pixels, for 1 to 64 visual tokens
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(limits), image_mean=half, image_std=half, **sizes),
        video_processor=Qwen3VLVideoProcessor(size=dict(limits), image_mean=half, image_std=half, **sizes),
        tokenizer=build_tokenizer(config.task),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(config: TinyPolicyConfig, processor: Qwen3VLProcessor) -> PreTrainedModel:
    """Build the untrained model in float32 without changing the global random state."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    hybrid = config.family == "qwen3_5"
    rotated = config.head_dim // 4 if hybrid else config.head_dim  # features, as in the released models
    spatial = rotated // 6
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            # the frequencies, divided among time, height and width
            "mrope_section": [rotated // 2 - 2 * spatial, spatial, spatial],
            "mrope_interleaved": True,
            **({"partial_rotary_factor": rotated / config.head_dim} if hybrid else {}),
        },
        "bos_token_id": None,
        "eos_token_id": token_id(END),
        "pad_token_id": token_id(PAD),
        "tie_word_embeddings": False,
    }
    vision: dict[str, Any] = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": 2 * config.vision_hidden_size,
        "num_heads": config.vision_heads,
        "patch_size": config.patch_size,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "out_hidden_size": config.hidden_size,
        "num_position_embeddings": 256,
        "initializer_range": config.initializer_range,
    }
    if hybrid:
        text |= {
            "layer_types": ["linear_attention"] * (config.layers - 1) + ["full_attention"],
            "linear_key_head_dim": 64,  # vLLM's kernel for CPUs has none for 32
            "linear_value_head_dim": 64,
            "linear_num_key_heads": config.kv_heads,
            "linear_num_value_heads": config.heads,
        }
    else:
        vision["deepstack_visual_indexes"] = list(config.deepstack)
    made, built = (
        (Qwen3_5Config, Qwen3_5ForConditionalGeneration) if hybrid else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    model_config: Any = made(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(IMAGE),
        video_token_id=token_id(VIDEO),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = built(model_config).float().eval()
    model.generation_config = GenerationConfig(eos_token_id=[token_id(END)], pad_token_id=token_id(PAD))
    return model


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
) -> torch.Tensor:
    """Return prompts and responses, long [B, P + T], sampled from the whole distribution or greedy at temperature 0."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    stop = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop.eos_token_id, pad_token_id=stop.pad_token_id, **sampling
    )
    # transformers annotates the self of generate() with a protocol that its own models do not satisfy
    return cast(Any, model).generate(**inputs, generation_config=config)
