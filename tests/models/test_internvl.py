"""InternVL in stock verl: the processor, the prompts for vLLM, the data set and the engine, on a tiny random model.

The whole stack (Ray, FSDP2, vLLM) runs with a folder that ``python tests/support/tiny_internvl.py FOLDER`` writes:

    MODEL_PATH=FOLDER bash scripts/run_grpo_tiny.sh trainer.total_training_steps=2 data.max_prompt_length=64 \\
        actor_rollout_ref.rollout.calculate_log_probs=True

``training/rollout_probs_diff_mean`` was 2e-5 in such runs, and 4e-3 with verl's ``qwen2_5_vl_dedup_image_tokens``: that
run ended without an error too, but vLLM had answered another prompt.
"""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
import verl
import verl.workers.rollout.utils as rollout_utils
from omegaconf import OmegaConf
from PIL import Image
from support.engine_rows import RowShape, log_prob_pass, make_rows, model_config, single_process_group, worker
from support.tiny_internvl import TOKENS_PER_TILE, build_processor, save_policy
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLForConditionalGeneration, InternVLModel

from sayo_verl.errors import SayoError
from sayo_verl.launch.model_check import load_config
from sayo_verl.models import internvl, internvl_model
from sayo_verl.models.internvl import one_token_per_image

STOCK_FORWARD = InternVLModel.forward
START, CONTEXT, END = 7, 8, 9  # ids in hand-written prompts
ROWS = [
    RowShape(((64, 64),), 6, [[]]),  # one tile
    RowShape(((128, 64), (33, 90)), 9, [[], []], text_between=True),  # 2 x 1 and 1 x 3 tiles, a thumbnail each
    RowShape((), 4, []),
    RowShape((), 6, []),  # the second of a micro-batch without images
    RowShape(((96, 96),), 1, [[]], system=True),  # 2 x 2
    RowShape(((150, 224),), 7, [[]]),  # 2 x 3
]


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    single_process_group()
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _classes_as_they_were():
    """verl and the adapter replace names for the whole process; other tests want the originals."""
    assert not hasattr(STOCK_FORWARD, "sayo_guarded"), "an earlier test left the guard in place"
    places = [
        (InternVLModel, "forward"),
        (InternVLForConditionalGeneration, "forward"),
        (rollout_utils, "qwen2_5_vl_dedup_image_tokens"),
    ]
    before = [getattr(*place) for place in places]
    yield
    for (owner, name), value in zip(places, before, strict=True):
        setattr(owner, name, value)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def config(policy):
    return model_config(policy, packed=True)


@pytest.fixture(scope="module")
def processor(config):
    return config.processor


@pytest.fixture(scope="module")
def rows(processor):
    return make_rows(processor, shapes=ROWS)


@pytest.fixture(scope="module")
def expected(policy, rows):
    """Log-probs of every next token by transformers alone, row by row, in float64: one tensor [S - 1] per row."""
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float64, attn_implementation="eager")
    out = []
    with mock.patch.object(InternVLModel, "forward", STOCK_FORWARD), torch.no_grad():
        for row in rows:
            images = {k: v.double() for k, v in row["multi_modal_inputs"].items() if k == "pixel_values"}
            logits = model(input_ids=row["input_ids"][None], **images).logits[0, :-1]
            out.append(logits.log_softmax(-1).gather(-1, row["input_ids"][1:, None])[:, 0])
    return out


def image_of(width, height, colours=((255, 0, 0),)):
    """An RGB image of vertical stripes of equal width."""
    stripes = np.zeros((height, width, 3), dtype=np.uint8)
    for n, colour in enumerate(colours):
        stripes[:, n * width // len(colours) : (n + 1) * width // len(colours)] = colour
    return Image.fromarray(stripes)


def prompt_text(processor, n_images, question="what colour is the circle ?"):
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tiles"), [((64, 64), 1), ((128, 64), 3), ((96, 96), 5)])
def test_the_tiny_folder_loads_and_runs_in_transformers(policy, size, tiles):
    processor, model = AutoProcessor.from_pretrained(policy), AutoModelForImageTextToText.from_pretrained(policy)
    assert type(processor) is transformers.InternVLProcessor
    assert type(model) is InternVLForConditionalGeneration
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    inputs = processor(text=[prompt_text(processor, 1)], images=[image_of(*size)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (tiles, 3, 64, 64)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tiles * TOKENS_PER_TILE
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


# --- the processor --------------------------------------------------------------------------------------------------


def test_verl_has_no_case_for_this_processor_still_needed(policy):
    from verl.utils.tokenizer import hf_processor

    with pytest.warns(UserWarning, match="Unsupported processor type: InternVLProcessor"):
        assert hf_processor(str(policy)) is None, "verl knows InternVL's processor now"


def test_other_families_get_what_verl_gives(random_policy, tmp_path):
    import verl.workers.config.model as model_config_module
    from verl.utils.tokenizer import hf_processor

    assert model_config_module.hf_processor is not hf_processor, "the plug-in did not activate the adapter"
    ours, stock = model_config_module.hf_processor(str(random_policy)), hf_processor(str(random_policy))
    assert type(ours) is type(stock) is transformers.Qwen3VLProcessor
    assert ours.get_rope_index.__func__ is stock.get_rope_index.__func__
    assert internvl.model_type_of(str(tmp_path)) is None, "an empty folder is for verl to judge"
    assert internvl.model_type_of(str(random_policy)) == "qwen3_vl"


@pytest.mark.parametrize(
    ("size", "grid"),
    # (width, height) -> (columns, rows) of 448 px tiles, at most 12
    [((640, 480), (4, 3)), ((224, 224), (1, 1)), ((150, 224), (2, 3)), ((800, 557), (3, 2)), ((448, 9000), (1, 12))],
)
def test_grid_of_full_size_tiles(size, grid):
    stock = build_processor(tile=448, max_tiles=12, tokens_per_tile=256)
    processor = internvl_model.InternVLProcessor(
        stock.image_processor, stock.tokenizer, stock.video_processor, 256, stock.chat_template
    )
    out = processor(text=[prompt_text(stock, 1)], images=[image_of(*size)], return_tensors="pt")
    assert out["image_tile_grid"].tolist() == [list(grid)]
    tiles = grid[0] * grid[1] + (grid != (1, 1))
    assert out["pixel_values"].shape == (tiles, 3, 448, 448)
    assert int((out["input_ids"] == processor.image_token_id).sum()) == tiles * 256


def test_tiles_are_row_major_and_the_thumbnail_is_last(processor):
    red, blue, green = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    two_rows = Image.new("RGB", (128, 128))
    two_rows.paste(image_of(128, 64, (red, blue)), (0, 0))
    two_rows.paste(image_of(128, 64, (green, green)), (0, 64))
    out = processor(text=[prompt_text(processor, 2)], images=[two_rows, image_of(64, 64)], return_tensors="pt")
    assert out["image_tile_grid"].dtype == torch.int64
    assert out["image_tile_grid"].tolist() == [[2, 2], [1, 1]]
    means = out["pixel_values"][:, :, 8:-8, 8:-8].mean((2, 3)) / 2 + 0.5  # the margin has the resize's ringing
    want = [red, blue, green, green, (64, 128, 64), red]
    torch.testing.assert_close(means, torch.tensor(want) / 255, rtol=0, atol=0.02)


def test_grid_follows_the_settings_of_the_call(processor):
    wide = image_of(256, 64)
    inputs = {"text": [prompt_text(processor, 1)], "images": [wide], "return_tensors": "pt"}
    assert processor(**inputs)["image_tile_grid"].tolist() == [[4, 1]]
    assert processor(**inputs, max_patches=2)["image_tile_grid"].tolist() == [[2, 1]]
    whole = processor(**inputs, crop_to_patches=False)
    assert whole["image_tile_grid"].tolist() == [[1, 1]]
    assert len(whole["pixel_values"]) == 1
    with pytest.raises(SayoError, match=r"SAYO-C03: .*size of a tile"):
        processor(**inputs, size={"height": 32, "width": 32})


def test_images_without_a_place_give_tensors_alone(processor):
    """After a rollout verl asks for an image's tensors with a text that has lost the placeholders."""
    image = image_of(128, 64, ((255, 0, 0), (0, 0, 255)))
    full = processor(text=[prompt_text(processor, 1)], images=[image], return_tensors="pt")
    for decoded in ("user\n\nwhat colour ?\nassistant\nred", "it says <IMG_CONTEXT> and <IMG_CONTEXT>"):
        bare = processor(text=[decoded], images=[image], return_tensors="pt")
        assert sorted(bare) == ["image_tile_grid", "pixel_values"]
        assert torch.equal(bare["pixel_values"], full["pixel_values"])
        assert torch.equal(bare["image_tile_grid"], full["image_tile_grid"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (lambda p: {"text": [prompt_text(p, 2)], "images": [image_of(64, 64)]}, "C04"),
        (lambda p: {"text": [prompt_text(p, 1, "where is <IMG_CONTEXT> ?")], "images": [image_of(64, 64)]}, "C04"),
        (lambda p: {"text": [prompt_text(p, 1)], "images": [np.zeros((64, 64, 3), np.uint8)]}, "C03"),
        (lambda p: {"text": [prompt_text(p, 0)], "images": []}, "C03"),
        (lambda p: {"text": ["<video>"], "videos": [np.zeros((2, 64, 64, 3), np.uint8)]}, "C02"),
    ],
    ids=["too-few-images", "placeholder-in-the-text", "array", "empty-list", "video"],
)
def test_bad_calls_are_refused(processor, arguments, code):
    with pytest.raises(SayoError, match=f"SAYO-{code}: .*fix: "):
        processor(**arguments(processor), return_tensors="pt")


def test_tiles_that_are_not_the_grids_are_refused(processor, monkeypatch):
    monkeypatch.setattr(internvl_model.InternVLProcessor, "_grids", lambda *_: [(3, 1)])
    with pytest.raises(SayoError, match=r"SAYO-C05: .*got 3 tiles.*wanted 4: \(columns, rows\) = \[\(3, 1\)\]"):
        processor(text=[prompt_text(processor, 1)], images=[image_of(128, 64)], return_tensors="pt")


def test_an_unknown_image_processor_is_refused(policy, monkeypatch):
    monkeypatch.setattr(internvl_model.tiling, "GotOcr2ImageProcessor", transformers.CLIPImageProcessor)
    with pytest.raises(SayoError, match=r"SAYO-C06: .*got GotOcr2ImageProcessor"):
        internvl_model.load_processor(str(policy))


def test_a_saved_processor_is_transformers_own(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is transformers.InternVLProcessor
    assert again.image_seq_length == TOKENS_PER_TILE
    assert again.chat_template == processor.chat_template


# --- prompts for vLLM -----------------------------------------------------------------------------------------------


def test_prompts_for_vllm_have_one_token_per_image(processor, random_policy):
    text = prompt_text(processor, 2)
    images = [image_of(128, 64), image_of(64, 64)]
    ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()
    collapsed = rollout_utils.qwen2_5_vl_dedup_image_tokens(ids, processor)
    assert collapsed == processor.tokenizer(text)["input_ids"]
    assert len(ids) - len(collapsed) == 4 * TOKENS_PER_TILE + 2  # 3 + 1 tiles; <img>, </img>, less the token that stays

    qwen = AutoProcessor.from_pretrained(random_policy)
    pad = qwen.image_token_id
    assert rollout_utils.qwen2_5_vl_dedup_image_tokens([1, pad, pad, 2], qwen) == [1, pad, 2]
    assert rollout_utils.qwen2_5_vl_dedup_image_tokens([1, 1], None) == [1, 1]


def test_a_server_that_is_already_imported_gets_the_replacement(monkeypatch):
    def stock(prompt_ids, processor):
        return prompt_ids

    server = SimpleNamespace(qwen2_5_vl_dedup_image_tokens=stock)
    monkeypatch.setitem(sys.modules, internvl._VLLM_SERVER, server)
    monkeypatch.setattr(rollout_utils, "qwen2_5_vl_dedup_image_tokens", stock)
    internvl.collapse_prompts_for_vllm()
    replacement = rollout_utils.qwen2_5_vl_dedup_image_tokens
    assert server.qwen2_5_vl_dedup_image_tokens is replacement is not stock
    internvl.collapse_prompts_for_vllm()
    assert rollout_utils.qwen2_5_vl_dedup_image_tokens is replacement, "replaced twice"


@pytest.mark.parametrize("tiles", [[], [1], [3, 1], [13, 1, 5]])
@pytest.mark.parametrize("between", [0, 2])
def test_collapsing_undoes_expanding(tiles, between):
    collapsed, expanded = [1], [1]
    for n in tiles:
        collapsed += [CONTEXT, *[2] * between]
        expanded += [START, *[CONTEXT] * n * 4, END, *[2] * between]
    assert one_token_per_image(expanded, start=START, image=CONTEXT, end=END, tokens_per_tile=4) == collapsed


@pytest.mark.parametrize(
    "prompt",
    [
        [1, CONTEXT, 2],
        [1, START, CONTEXT, CONTEXT, CONTEXT, END],
        [1, START, *[CONTEXT] * 4],
        [1, START, *[CONTEXT] * 4, 2],
        [1, *[CONTEXT] * 4, END],
    ],
    ids=["already-collapsed", "part-of-a-tile", "cut-off", "no-end", "no-start"],
)
def test_prompts_that_are_not_the_processors_are_refused(prompt):
    with pytest.raises(SayoError, match=r"SAYO-C01: .*wanted a multiple of 4 between <img>"):
        one_token_per_image(prompt, start=START, image=CONTEXT, end=END, tokens_per_tile=4)


def test_the_server_calls_the_function_by_this_name():
    source = (Path(verl.__file__).parent / "workers/rollout/vllm_rollout/vllm_async_server.py").read_text()
    assert "prompt_ids = qwen2_5_vl_dedup_image_tokens(prompt_ids, self.model_config.processor)" in source
    assert internvl._VLLM_SERVER == "verl.workers.rollout.vllm_rollout.vllm_async_server"


def test_delimiters_without_an_image_stay():
    assert one_token_per_image([START, 2, END], start=START, image=CONTEXT, end=END, tokens_per_tile=4) == [7, 2, 9]


# --- the data set ---------------------------------------------------------------------------------------------------


def read_images(part):
    from sayo_verl.models.internvl_data import InternVLDataset

    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}]
    return InternVLDataset._process_multi_modal_info(messages, 14, OmegaConf.create({}))


def test_images_keep_their_size_and_verls_own_class_changes_it_still_needed(tmp_path):
    from verl.utils.dataset.rl_dataset import RLHFDataset, get_dataset_class

    ours = get_dataset_class(
        OmegaConf.create({"custom_cls": {"path": "pkg://sayo_verl.models.internvl_data", "name": "InternVLDataset"}})
    )
    assert issubclass(ours, RLHFDataset)
    data = io.BytesIO()
    image_of(100, 50).save(data, "PNG")
    image_of(100, 50).save(tmp_path / "image.png")
    for source in (Image.open(data), str(tmp_path / "image.png"), f"file://{tmp_path}/image.png"):
        (image,), videos, audios = read_images({"type": "image", "image": source})
        assert (image.size, image.mode, videos, audios) == ((100, 50), "RGB", None, None)
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(data)}]}]
    (resized,), _, _ = RLHFDataset._process_multi_modal_info(messages, 14, OmegaConf.create({}))
    assert resized.size != (100, 50), "verl's own class keeps sizes now"
    assert ours._process_multi_modal_info([{"role": "user", "content": "text"}], 14, None) == (None, None, None)


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "video", "video": "x.mp4"}, "D30"),
        ({"type": "image", "image": Image.new("RGB", (8, 8)), "max_pixels": 784}, "D31"),
        ({"type": "image", "image": "https://example.org/x.png"}, "D32"),
        ({"type": "image"}, "D32"),
    ],
    ids=["video", "max_pixels", "address", "nothing"],
)
def test_what_is_not_an_image_is_refused(part, code):
    with pytest.raises(SayoError, match=f"SAYO-{code}: .*fix: "):
        read_images(part)


# --- the launch -------------------------------------------------------------------------------------------------------


def composed(policy, **changes):
    """The settings that the adapter reads, as the launcher composes them."""
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "model": {"path": str(policy), "use_fused_kernels": False},
                "actor": {"ulysses_sequence_parallel_size": 1, "fsdp_config": {"ulysses_sequence_parallel_size": 1}},
                "ref": {"fsdp_config": {"ulysses_sequence_parallel_size": 1}},
                "rollout": {"name": "vllm"},
            },
            "data": {"custom_cls": {"path": None, "name": None}},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def configure(config) -> bool:
    return internvl.configure(config, load_config(config.actor_rollout_ref.model.path, dry_run=True))


def test_the_launch_names_the_data_set_for_this_family_only(policy, random_policy):
    config = composed(policy)
    assert configure(config)
    assert config.data.custom_cls == {"path": "pkg://sayo_verl.models.internvl_data", "name": "InternVLDataset"}
    own = composed(policy, data__custom_cls__path="mine.py", data__custom_cls__name="Mine")
    assert configure(own)
    assert own.data.custom_cls.path == "mine.py"
    other = composed(random_policy, actor_rollout_ref__rollout__name="sglang")
    before = OmegaConf.to_container(other)
    assert not configure(other)
    assert OmegaConf.to_container(other) == before


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("actor_rollout_ref__model__use_fused_kernels", True, "C07"),
        ("actor_rollout_ref__actor__ulysses_sequence_parallel_size", 2, "C08"),
        ("actor_rollout_ref__actor__fsdp_config__ulysses_sequence_parallel_size", 2, "C08"),
        ("actor_rollout_ref__ref__fsdp_config__ulysses_sequence_parallel_size", 2, "C08"),
        ("actor_rollout_ref__rollout__name", "sglang", "C09"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_launch(policy, key, value, code):
    with pytest.raises(SayoError, match=rf"SAYO-{code}: .*at {key.replace('__', '.')} .*fix: "):
        configure(composed(policy, **{key: value}))


# --- the engine -----------------------------------------------------------------------------------------------------


def test_rows_of_the_agent_loop(rows, processor):
    """What verl's agent loop stores per row: tensors of the right tiles, their grid, and plain positions."""
    grids = [row["multi_modal_inputs"].get("image_tile_grid", torch.zeros(0, 2)).tolist() for row in rows]
    assert grids == [[[1, 1]], [[2, 1], [1, 3]], [], [], [[2, 2]], [[2, 3]]]
    for row in rows:
        assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))
        tiles = len(row["multi_modal_inputs"].get("pixel_values", ()))
        assert int((row["input_ids"] == processor.image_token_id).sum()) == tiles * TOKENS_PER_TILE
    assert rows[2]["multi_modal_inputs"] == {}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_log_probs_equal_those_of_transformers(policy, rows, expected, packed, dynamic):
    built = worker(model_config(policy, packed=packed), dynamic=dynamic)
    output = log_prob_pass(built, rows, None)
    errors = [
        (got[:-1].double() - want).abs().max().item()
        for got, want in zip(output["log_probs"].unbind(), expected, strict=True)
    ]
    print(f"largest error of a log-prob against float64, packed={packed}, dynamic={dynamic}: {max(errors):.2e}")
    assert max(errors) < 1e-5


def test_the_image_matters_to_the_log_probs(policy, rows, expected):
    """The comparison above would also pass for a model that ignores its images."""
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float64)
    row = rows[1]
    pixels = row["multi_modal_inputs"]["pixel_values"].double()
    with mock.patch.object(InternVLModel, "forward", STOCK_FORWARD), torch.no_grad():
        logits = model(input_ids=row["input_ids"][None], pixel_values=pixels.flip(0)).logits[0, :-1]
    flipped = logits.log_softmax(-1).gather(-1, row["input_ids"][1:, None])[:, 0]
    assert (flipped - expected[1]).abs().max() > 0.05, "tiles in another order change nothing"


def test_a_micro_batch_without_images_runs_the_vision_tower_and_changes_nothing(policy, rows):
    """Under FSDP every rank must gather the same layers in the same order."""
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    ids = rows[2]["input_ids"][None]
    with mock.patch.object(InternVLModel, "forward", STOCK_FORWARD):
        stock = model(input_ids=ids, use_cache=False).logits
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    guarded = model(input_ids=ids, use_cache=False).logits
    assert calls == [1]
    assert torch.equal(guarded, stock)
    guarded.logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    vision = {name for name, _ in model.named_parameters() if "vision_tower" in name or "projector" in name}
    assert set(gradients) == vision
    assert all(gradient is not None for gradient in gradients.values()), "a vision parameter has no gradient"


def test_the_grid_does_not_reach_the_text_model(policy, rows):
    model = AutoModelForImageTextToText.from_pretrained(policy)
    seen = []
    model.model.language_model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=rows[0]["input_ids"][None], **rows[0]["multi_modal_inputs"])
    assert "image_tile_grid" not in seen[0]


def test_visual_tokens_without_pixels_are_refused(policy, rows):
    model = AutoModelForImageTextToText.from_pretrained(policy)
    with pytest.raises(SayoError, match=r"SAYO-C07: .*use_fused_kernels=False"):
        model(input_ids=rows[0]["input_ids"][None])


def test_fused_kernels_are_refused(policy, rows):
    """verl's fused forward for families it does not know never passes the pixels on."""
    built = worker(model_config(policy, packed=True, fused=True), dynamic=False)
    with pytest.raises(SayoError, match=r"SAYO-C07"):
        log_prob_pass(built, rows[:2], None)


def test_ulysses_is_refused(policy, rows, monkeypatch):
    monkeypatch.setattr("verl.utils.ulysses.get_ulysses_sequence_parallel_world_size", lambda: 2)
    model = AutoModelForImageTextToText.from_pretrained(policy)
    with pytest.raises(SayoError, match=r"SAYO-C08: .*got 2, wanted 1"):
        model(input_ids=rows[2]["input_ids"][None])
