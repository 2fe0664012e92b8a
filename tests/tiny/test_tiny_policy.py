"""The tiny policy: tokenizer, image grid, batching, warm-up, cache and evaluation."""

import asyncio
import io
import math
import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support.refusals import refusal
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sayo_verl.errors import SayoError
from sayo_verl.reward import compute_score
from sayo_verl.scenes import SceneConfig, sample_scene
from sayo_verl.scenes.walk import WalkConfig, demonstration, sample_walk
from sayo_verl.tiny import policy
from sayo_verl.tiny import warmup as warmup_module
from sayo_verl.tiny.evaluate import evaluate, measure_batch, region_attention, select_tokens
from sayo_verl.tiny.policy import (
    END,
    SPECIAL_TOKENS,
    TAGS,
    TinyPolicyConfig,
    build_model,
    build_processor,
    build_tokenizer,
    generate,
    task_words,
)
from sayo_verl.tiny.prepared import prepare_scenes, prepare_walks
from sayo_verl.tiny.warmup import (
    IGNORE,
    WarmupConfig,
    policy_hash,
    prepare_policy,
    prompt_batch,
    sample_response,
    training_batch,
    warm_up,
    warm_up_loss,
)
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import region_mask

SCENES = SceneConfig(n_train=2, n_val=4)
QUICK = WarmupConfig(
    max_steps=2, eval_every=2, eval_scenes=4, batch_size=2, accuracy_floor=0.0, max_new_tokens=4, warmup_steps=1
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small run slower on several threads, and single-thread results repeat exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor():
    return build_processor(TinyPolicyConfig())


@pytest.fixture(scope="module")
def model(processor):
    return build_model(TinyPolicyConfig(), processor)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("out")
    return root, prepare_policy(root, TinyPolicyConfig(), QUICK, SCENES)


def _scenes(n: int, seed: int = 0):
    rng = random.Random(seed)
    return [sample_scene(rng, SCENES) for _ in range(n)]


def _responses(scenes, seed: int = 0):
    rng = random.Random(seed)
    return [sample_response(rng, scene, WarmupConfig()) for scene in scenes]


def test_every_word_of_the_task_is_one_token_and_tags_survive_decoding(processor):
    tokenizer = processor.tokenizer
    for word in (*task_words(), *TAGS, *SPECIAL_TOKENS):
        assert len(tokenizer.encode(word)) == 1, word
    ids = tokenizer.encode("<think> circle red .</think><answer> red</answer><|im_end|>")
    assert len(ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think> circle red .</think><answer> red</answer>"
    assert tokenizer.eos_token == END


def test_every_word_of_a_walk_is_one_token():
    config = TinyPolicyConfig(task="walk")
    tokenizer = build_processor(config).tokenizer
    for seed in range(20):
        for more in ({}, {"moves": "text"}, {"grid": 8, "steps": 63, "more_steps": 0}):
            walk = sample_walk(random.Random(seed), WalkConfig(**more))
            words = demonstration(walk, random.Random(seed))
            said = "".join(f" {word}" for word in words)
            ids = tokenizer.encode(f"{said}{END}")
            assert len(ids) == len(words) + 1
            assert tokenizer.decode(ids, skip_special_tokens=True).split() == words
            assert len(tokenizer.encode(walk.question)) == len(walk.question.split())
    assert config.config_hash() != TinyPolicyConfig().config_hash()


def test_the_words_of_the_scenes_keep_their_tokens():
    ids = build_tokenizer().encode("What colour is the ring?<think> ring red .</think><answer> red</answer>")
    assert ids == [327, 340, 307, 325, 333, 30, 353, 333, 332, 305, 354, 355, 332, 356]  # recorded before walks


def test_the_warm_up_and_the_evaluation_on_scenes_refuse_walks(tmp_path):
    with refusal("D84", "'walk'"):
        prepare_policy(tmp_path, TinyPolicyConfig(task="walk"), QUICK, SCENES)
    walks = prepare_walks(tmp_path, WalkConfig(n_train=1, n_val=2)).path
    with refusal("D85", "6 of 6 without target_boxes"):
        evaluate(tmp_path, walks)


def test_a_tokenizer_that_splits_words_of_the_task_is_refused(monkeypatch):
    words = iter([("circle",), ("circle", "unknown word")])  # of the training, of the check
    monkeypatch.setattr(policy, "task_words", lambda task: next(words))
    with pytest.raises(SayoError, match=r"SAYO-T02: .*got \['unknown word'\]"):
        policy.build_tokenizer()


@pytest.mark.parametrize("text", ["Straße, 東京 \n\t x=3.5!", "<think> the ring is blue . </think>", "What shape"])
def test_any_text_survives_the_tokenizer(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_model_has_one_row_per_token(processor, model):
    n = len(processor.tokenizer)
    assert sorted(processor.tokenizer.get_vocab().values()) == list(range(n))
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == n
    assert model.config.text_config.vocab_size == n
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_building_twice_gives_the_same_weights_and_leaves_the_random_state(processor, model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = build_model(TinyPolicyConfig(), processor)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = build_model(TinyPolicyConfig(seed=1), processor)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_prompts_are_the_ones_verl_makes(prepared, tmp_path):
    """Row -> verl's dataset -> its image loading -> its prompt builder: the same tokens and pixels as the warm-up's."""
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer import hf_processor, hf_tokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    folder = prepared[1].path
    processor, tokenizer = hf_processor(str(folder)), hf_tokenizer(str(folder))
    # verl filters long prompts in a forked process, which can hang once torch has run with several threads
    data = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path)})
    dataset = RLHFDataset(str(prepare_scenes(tmp_path, SCENES).path / "val-00000.parquet"), tokenizer, data, processor)
    assert len(dataset) == SCENES.n_val
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3_vl", processor=processor)
    for item in range(SCENES.n_val):
        row = dataset[item]
        images, _, _ = asyncio.run(RLHFDataset.process_multi_modal_info(row["raw_prompt"], 16, data))
        seen: dict = {}
        ids = builder.build_initial_tokens(row["raw_prompt"], images=images, mm_inputs_out=seen)
        ours = prompt_batch(build_processor(TinyPolicyConfig()), [row["extra_info"]["question"]], images)
        assert list(ids) == ours["input_ids"][0].tolist()
        assert torch.equal(seen["pixel_values"], ours["pixel_values"])
        assert seen["image_grid_thw"].tolist() == [[1, 6, 6]]  # patches; 3 x 3 visual tokens after merging
        assert list(ids).count(processor.image_token_id) == 9


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_single_forwards(processor, model, padding_side):
    scenes = _scenes(6)
    if padding_side == "left":
        inputs = prompt_batch(processor, [s.question for s in scenes], [s.image for s in scenes])
    else:
        inputs, _ = training_batch(processor, scenes, _responses(scenes))
    assert not inputs["attention_mask"].bool().all()  # else nothing is padded and nothing is tested
    with torch.no_grad():
        batched = model(**inputs).logits
        for b, scene in enumerate(scenes):
            real = inputs["attention_mask"][b].bool()
            one = processor(
                text=[processor.tokenizer.decode(_collapsed(inputs["input_ids"][b][real], processor))],
                images=[scene.image],
                return_tensors="pt",
            )
            assert torch.equal(one["input_ids"][0], inputs["input_ids"][b][real])
            torch.testing.assert_close(batched[b][real], model(**one).logits[0], rtol=1e-4, atol=1e-4)


def _collapsed(ids: torch.Tensor, processor) -> list[int]:
    """The prompt with one placeholder per image, as it was before the processor widened it."""
    image = processor.image_token_id
    return [t for i, t in enumerate(ids.tolist()) if t != image or i == 0 or ids[i - 1] != image]


def test_labels_are_the_response_and_its_end(processor):
    scenes = _scenes(5)
    responses = _responses(scenes)
    inputs, labels = training_batch(processor, scenes, responses)
    for b, response in enumerate(responses):
        labelled = labels[b][labels[b] != IGNORE]
        assert processor.tokenizer.decode(labelled) == response + END
        first = int((labels[b] != IGNORE).nonzero()[0])
        assert processor.tokenizer.decode(inputs["input_ids"][b, first - 3 : first]) == "<|im_start|>assistant\n"


def test_responses_are_right_well_formed_and_mixed_as_configured():
    rng = random.Random(0)
    kinds = {"target only": 0, "others, then target": 0, "one other": 0}
    for scene in _scenes(600):
        text = sample_response(rng, scene, WarmupConfig())
        assert compute_score("", text, scene.answer)["score"] == 2.0
        thought = text.split("</think>")[0].removeprefix("<think>").split(".")[:-1]
        key = scene.key_word(scene.target)
        names_target = [sentence.split()[0] == key for sentence in thought]
        kinds[
            "target only" if names_target == [True] else "others, then target" if any(names_target) else "one other"
        ] += 1
        for sentence in thought:
            assert any(sorted(sentence.split()) == sorted([o.shape, o.colour]) for o in scene.objects)
    for kind, share in (("target only", 0.4), ("others, then target", 0.3), ("one other", 0.3)):
        assert abs(kinds[kind] / 600 - share) < 0.07, kinds


def test_the_loss_presses_special_tokens_down_only_above_the_limit():
    logits = torch.zeros(1, 3, 5)
    labels = torch.tensor([[IGNORE, IGNORE, 2]])
    config = WarmupConfig(forbid_log_prob=-3.0)
    loss, excess = warm_up_loss(logits, labels, [0, 1], config)
    assert loss.item() == pytest.approx(math.log(5))
    assert excess.item() == pytest.approx(math.log(2 / 5) + 3.0)
    logits[0, 1, :2] = -20.0
    assert warm_up_loss(logits, labels, [0, 1], config)[1].item() == 0.0


def test_a_few_steps_of_warm_up_lower_the_loss_and_repeat_exactly(processor):
    config = replace(QUICK, max_steps=20, eval_every=5, batch_size=8, warmup_steps=5)
    weights, histories = [], []
    for _ in range(2):
        model = build_model(TinyPolicyConfig(), processor)
        histories.append(warm_up(model, processor, config, SCENES)["history"])
        weights.append(model.lm_head.weight.detach())
    losses = [loss for _, loss, _ in histories[0]]
    assert losses[-1] < 0.6 * losses[0]
    assert histories[0] == histories[1]
    assert torch.equal(*weights)


def test_a_policy_that_does_not_learn_is_refused(tmp_path):
    with pytest.raises(SayoError, match="SAYO-T01"):
        prepare_policy(tmp_path, TinyPolicyConfig(), replace(QUICK, accuracy_floor=0.5), SCENES)
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_policy_is_reused_and_an_incomplete_one_is_rebuilt(prepared, monkeypatch):
    root, (folder, reused) = prepared
    assert not reused
    trained = []
    real = warmup_module.warm_up
    monkeypatch.setattr(warmup_module, "warm_up", lambda *args: trained.append(1) or real(*args))
    assert prepare_policy(root, TinyPolicyConfig(), QUICK, SCENES) == (folder, True)
    assert prepare_policy(root, TinyPolicyConfig(), QUICK, replace(SCENES, n_train=9, region="distractor")).reused
    assert not trained
    (folder / "model.safetensors").unlink()
    assert prepare_policy(root, TinyPolicyConfig(), QUICK, SCENES) == (folder, False)
    assert len(trained) == 1


def test_the_hash_follows_what_decides_the_weights():
    base = policy_hash(TinyPolicyConfig(), QUICK, SCENES)
    assert base == policy_hash(TinyPolicyConfig(), QUICK, replace(SCENES, n_val=7, seed=3))
    others = {
        policy_hash(TinyPolicyConfig(seed=1), QUICK, SCENES),
        policy_hash(TinyPolicyConfig(), replace(QUICK, seed=1), SCENES),
        policy_hash(TinyPolicyConfig(), QUICK, replace(SCENES, max_objects=5)),
    }
    assert len(others | {base}) == 4


def test_the_saved_folder_loads_with_auto_classes_and_generates(prepared):
    folder = prepared[1].path
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.text_config.vocab_size
    assert model.dtype == torch.float32
    scenes = _scenes(3)
    inputs = prompt_batch(processor, [s.question for s in scenes], [s.image for s in scenes])
    ids = generate(model, inputs, max_new_tokens=5, temperature=0.0)
    assert ids.shape == (3, inputs["input_ids"].shape[1] + 5)
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids(END)]


def test_selected_tokens_are_the_most_uncertain_ones():
    assert select_tokens(np.array([0.1, 0.9, 0.5, 0.9, 0.0, 0.2, 0.3]), 0.3).tolist() == [1, 3]
    assert select_tokens(np.array([0.1, 0.9]), 0.3).tolist() == [1]
    assert select_tokens(np.zeros(9), 0.3).tolist() == [0, 1]


def test_region_attention_by_hand():
    region = np.array([True, False, False, False])
    x = 2.5  # a / v with a = 0.5 and v = 0.2; R_a = x^2 / (x^2 + 1)
    assert region_attention(np.array([[0.5, 0.1, 0.1, 0.1]]), region) == pytest.approx(x**2 / (x**2 + 1), abs=1e-6)
    assert region_attention(np.array([[0.1, 0.1, 0.1, 0.1]]), region) == pytest.approx(0.5)


@pytest.mark.parametrize("ends_early", [True, False])
def test_batched_measures_equal_a_plain_forward(prepared, processor, tmp_path, ends_early):
    """The padded batch against HF's own forward of each row alone, with the positions written out."""
    if ends_early:  # two steps of training: responses of two or three tokens
        model = AutoModelForImageTextToText.from_pretrained(prepared[1].path, attn_implementation="eager")
    else:
        model = build_model(TinyPolicyConfig(), processor)
        model.set_attn_implementation("eager")
    rows = pq.read_table(prepare_scenes(tmp_path, SCENES).path / "val-00000.parquet").to_pylist()
    batched = measure_batch(model, processor, rows, temperature=0.0, max_new_tokens=7)
    prompt_lengths, response_lengths = set(), set()
    for row, measured in zip(rows, batched, strict=True):
        info = row["extra_info"]
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        prompt = prompt_batch(processor, [info["question"]], [image])
        ids = generate(model, prompt, max_new_tokens=7, temperature=0.0)
        P, S = prompt["input_ids"].shape[1], ids.shape[1]
        assert END not in processor.tokenizer.convert_ids_to_tokens(ids[0, P : S - 1].tolist())
        types = torch.cat([prompt["mm_token_type_ids"], torch.zeros(1, S - P, dtype=torch.int)], 1)
        sizes = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
        with torch.no_grad():
            output = model(input_ids=ids, mm_token_type_ids=types, **sizes, output_attentions=True)
        images_at = [s for s in range(S) if ids[0, s] == processor.image_token_id]
        target = region_mask(info["target_boxes"][0], [Tile(3, 3)])
        visual, entropy = [], []
        for t in range(P, S):
            visual.append(output.attentions[-1][0, :, t, images_at].mean(0).numpy())  # t: where the token is the input
            p = output.logits[0, t - 1].softmax(-1)  # t - 1: what sampled it
            entropy.append(-float((p * p.log()).sum()))
        top = sorted(range(S - P), key=lambda j: -entropy[j])[: max(1, (S - P) * 3 // 10)]
        a = np.mean([visual[j][target].mean() for j in top])
        v = np.mean([visual[j].mean() for j in top])
        assert measured["target_attention"] == pytest.approx((a / v) ** 2 / ((a / v) ** 2 + 1), abs=1e-4)
        assert measured["image_mass"] == pytest.approx(np.mean([row_V.sum() for row_V in visual]), abs=1e-4)
        assert measured["entropy"] == pytest.approx(np.mean(entropy), abs=1e-4)
        assert measured["response_tokens"] == S - P
        assert measured["box_tokens"] == 1.0
        prompt_lengths.add(P)
        response_lengths.add(S - P)
    assert len(prompt_lengths) == 2  # so that padding was at work
    assert (max(response_lengths) < 7) == ends_early


def test_evaluate_reports_means_over_rows(prepared, tmp_path):
    scenes = prepare_scenes(tmp_path, SCENES).path
    how = {"samples_per_row": 2, "batch_size": 3, "max_new_tokens": 4}
    first = evaluate(prepared[1].path, scenes, seed=1, **how)
    assert first == evaluate(prepared[1].path, scenes / "val-00000.parquet", seed=1, **how)
    assert first["entropy"] != evaluate(prepared[1].path, scenes, seed=2, **how)["entropy"]
    assert (first["rows"], first["samples_per_row"]) == (4, 2)
    assert 0 < first["target_attention"]["mean"] < 1
    assert first["format"]["mean"] == 0.0  # two steps of training do not teach the format


def test_the_family_is_an_option_and_leaves_other_folders_their_names(processor):
    hybrid = TinyPolicyConfig(family="qwen3_5")
    assert TinyPolicyConfig().config_hash() == "f2f376f5a6", "folders of the default family are still found"
    assert hybrid.config_hash() != TinyPolicyConfig().config_hash()
    model = build_model(hybrid, processor)
    assert model.config.model_type == "qwen3_5"
    assert model.config.text_config.layer_types == ["linear_attention", "full_attention"]
