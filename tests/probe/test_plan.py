"""Plans of rows: which keys are visual tokens, boxes, turns; and the grids of a row's images.

Shape suffixes: none; tensors here are masks over the tokens of one row.
"""

from types import SimpleNamespace

import pytest
import torch
from support.refusals import refusal

from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.plan import ChatTokens, RowPlan, image_tiles, plan_row, video_tokens
from sayo_verl.vision.grids import Tile, merged_grid, tile_grid

IMAGE = 99
TWO_IMAGES = [1, *[IMAGE] * 4, 2, *[IMAGE] * 6, 3]  # 2 x 2 and 2 x 3 tokens, at 1..4 and 6..11
GRIDS = [(1, 4, 4), (1, 4, 6)]
WHOLE = [0.0, 0.0, 1.0, 1.0]


def plan(ids: list[int], response: int, grids=((1, 4, 4),), boxes=((),), images=None, **options) -> RowPlan:
    tiles = [merged_grid(*grid, 2, where="test") for grid in grids] if images is None else images
    return plan_row(
        torch.tensor(ids),
        response,
        image_token_id=IMAGE,
        images=tiles,
        boxes=boxes,
        coverage=options.pop("coverage", 0.5),
        where="row 3 of the batch",
        **options,
    )


def at(row: RowPlan, name: str) -> list[int]:
    assert row.keys[name].dtype == torch.bool
    assert row.keys[name].shape == (row.length,)
    return row.keys[name].nonzero().flatten().tolist()


# ----------------------------------------------------------------------------------------------------- images and boxes


def test_a_row_with_two_images():
    boxes = [[[0.5, 0.0, 1.0, 0.5]], [[0.67, 0.0, 1.0, 1.0], [0.0, 0.5, 0.33, 1.0]]]
    row = plan([*TWO_IMAGES, 7, 8], 2, grids=GRIDS, boxes=boxes)
    assert (row.length, row.response_length, row.region_tokens) == (15, 2, 4)
    assert row.image_columns.dtype == torch.int64
    assert row.image_columns.tolist() == at(row, "image") == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    # image 0: upper right token; image 1: right column (tokens 2 and 5) and lower left token (3)
    assert at(row, "region") == [2, 6 + 2, 6 + 3, 6 + 5]
    assert not any(name.startswith("box") for name in row.keys)


def test_single_boxes_are_kept_apart_in_the_order_of_the_row():
    boxes = [[[0.5, 0.0, 1.0, 0.5]], [[0.67, 0.0, 1.0, 1.0], [0.0, 0.5, 0.33, 1.0]]]
    row = plan([*TWO_IMAGES, 7, 8], 2, grids=GRIDS, boxes=boxes, n_boxes=4)
    assert [at(row, f"box{i}") for i in range(4)] == [[2], [6 + 2, 6 + 5], [6 + 3], []]
    assert "box4" not in row.keys
    fewer = plan([*TWO_IMAGES, 7, 8], 2, grids=GRIDS, boxes=boxes, n_boxes=2)
    assert [at(fewer, f"box{i}") for i in range(2)] == [[2], [6 + 2, 6 + 5]]
    assert "box2" not in fewer.keys
    assert at(fewer, "region") == at(row, "region"), "a box that is not kept apart still belongs to the region"


def test_boxes_may_overlap():
    boxes = [[[0.0, 0.0, 1.0, 0.5], [0.5, 0.0, 1.0, 1.0]]]
    row = plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=boxes, n_boxes=2)
    assert (at(row, "box0"), at(row, "box1"), at(row, "region")) == ([1, 2], [2, 4], [1, 2, 4])
    assert row.region_tokens == 3


def test_one_image_may_go_without_a_box():
    row = plan([*TWO_IMAGES, 7], 1, grids=GRIDS, boxes=[[], [[0.0, 0.0, 0.33, 0.5]]], n_boxes=1)
    assert at(row, "region") == at(row, "box0") == [6]


def test_images_side_by_side_do_not_mix():
    row = plan([1, *[IMAGE] * 10, 7], 1, grids=GRIDS, boxes=[[WHOLE], [[0.0, 0.0, 0.33, 0.5]]], n_boxes=2)
    assert (at(row, "box0"), at(row, "box1")) == ([1, 2, 3, 4], [5])


def test_the_coverage_reaches_the_rule_of_boxes():
    box = [[[0.0, 0.0, 0.7, 1.0]]]  # all of the left tokens, two fifths of the right ones
    ids = [1, *[IMAGE] * 4, 2, 7]
    assert at(plan(ids, 1, boxes=box, coverage=0.5), "region") == [1, 3]
    assert at(plan(ids, 1, boxes=box, coverage=0.3), "region") == [1, 2, 3, 4]


def test_a_placeholder_that_the_policy_sampled_is_not_an_image():
    row = plan([1, *[IMAGE] * 4, 2, 7, IMAGE, IMAGE, 8], 4, boxes=[[WHOLE]], n_boxes=1)
    assert row.image_columns.tolist() == at(row, "image") == at(row, "region") == at(row, "box0") == [1, 2, 3, 4]
    assert row.region_tokens == 4
    assert at(row, "response") == [6, 7, 8, 9]


@pytest.mark.parametrize("boxes", [[[]], [], None], ids=["none", "no lists", "null"])
def test_a_row_without_a_box_has_no_region(boxes):
    row = plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=boxes, n_boxes=2)
    assert (row.image_columns.numel(), row.region_tokens) == (4, 0)
    assert at(row, "region") == at(row, "box0") == at(row, "box1") == []


@pytest.mark.parametrize("boxes", [[], [[WHOLE]]], ids=["no boxes", "boxes of a padding row"])
def test_a_row_without_an_image_has_nothing_marked(boxes):
    row = plan([1, 2, 3, 7], 1, grids=(), boxes=boxes, n_boxes=1)
    assert (row.image_columns.numel(), row.region_tokens) == (0, 0)
    assert at(row, "image") == at(row, "region") == at(row, "box0") == []


def test_sink_and_response():
    row = plan([1, *[IMAGE] * 4, 2, 7, 8], 2)
    assert (at(row, "sink"), at(row, "response")) == ([0], [6, 7])
    assert at(plan([1, 7], 1, grids=()), "response") == [1]
    empty = plan([1, 2], 0, grids=())
    assert (empty.response_length, at(empty, "response")) == (0, [])


def test_ids_on_another_integer_type_are_fine():
    ids = torch.tensor([1, *[IMAGE] * 4, 2, 7], dtype=torch.int32)
    tiles = [merged_grid(1, 4, 4, 2, where="test")]
    row = plan_row(ids, 1, image_token_id=IMAGE, images=tiles, boxes=[], coverage=0.5, where="row")
    assert row.image_columns.tolist() == [1, 2, 3, 4]


def test_tiles_of_an_image_and_its_thumbnail():
    # 2 x 1 tiles of 2 x 2 tokens and a thumbnail of 2 x 2: 12 tokens
    images = [tile_grid(2, 1, 2, where="test")]
    row = plan([1, *[IMAGE] * 12, 2, 7], 1, images=images, boxes=[[[0.0, 0.0, 0.5, 1.0]]], n_boxes=1)
    # the left tile's four tokens, and the left column of the thumbnail
    assert at(row, "box0") == at(row, "region") == [1, 2, 3, 4, 9, 11]
    two = [tile_grid(1, 1, 2, where="test"), *images]  # a single tile has no thumbnail
    row = plan(
        [1, *[IMAGE] * 4, 2, *[IMAGE] * 12, 3, 7], 1, images=two, boxes=[[WHOLE], [[0.5, 0.0, 1.0, 1.0]]], n_boxes=2
    )
    assert at(row, "box0") == [1, 2, 3, 4]
    assert at(row, "box1") == [6 + i for i in (4, 5, 6, 7, 9, 11)]
    assert row.region_tokens == 10


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("ids", "grids", "got", "wanted"),
    [
        ([1, *[IMAGE] * 3, 2, 7], [(1, 4, 4)], "3 placeholders", "4 (1 images of [4] visual tokens)"),
        ([1, *[IMAGE] * 5, 2, 7], [(1, 4, 4)], "5 placeholders", "4 (1 images"),
        ([1, 2, 7], [(1, 4, 4)], "0 placeholders", "4 (1 images"),
        ([1, IMAGE, 2, 7], [], "1 placeholders", "0 (0 images"),
        ([*TWO_IMAGES[:-2], 7], GRIDS, "9 placeholders", "10 (2 images of [4, 6] visual tokens)"),
        ([1, 2, *[IMAGE] * 4], [(1, 4, 4)], "3 placeholders", "4 (1 images"),
    ],
    ids=["one cut off", "one too many", "no placeholder", "no grid", "second image cut", "the last in the response"],
)
def test_placeholders_that_do_not_fit_the_grids_are_refused(ids, grids, got, wanted):
    with refusal("P05", "placeholders") as caught:
        plan(ids, 1, grids=grids)
    assert caught.value.where == "row 3 of the batch"
    assert got in caught.value.got
    assert wanted in caught.value.wanted
    assert "data.max_prompt_length" in caught.value.fix


@pytest.mark.parametrize("boxes", [[[WHOLE]], [[WHOLE], [], []], [[]]], ids=["one list", "three lists", "empty"])
def test_boxes_that_are_not_nested_by_image_are_refused(boxes):
    with refusal("D05", "nested by image") as caught:
        plan([*TWO_IMAGES, 7], 1, grids=GRIDS, boxes=boxes)
    assert f"{len(boxes)} entries for 2 images" in caught.value.got


@pytest.mark.parametrize(("ids", "response"), [([1, 2], 2), ([1, 2], 3), ([1, 2], -1), ([], 0)], ids=str)
def test_a_row_without_a_prompt_is_refused(ids, response):
    with refusal("P21", "no prompt token") as caught:
        plan(ids, response, grids=())
    assert f"{len(ids)} tokens, {response} of the response" in caught.value.got


def test_a_bad_box_is_refused_with_its_row():
    with refusal("V02") as caught:
        plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=[[WHOLE, [0.5, 0.5, 0.25, 0.25]]])
    assert "row 3 of the batch" in caught.value.where
    with refusal("V04"):
        plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=[[WHOLE]], coverage=0.0)


# ---------------------------------------------------------------------------------------------- grids of a row's images

QWEN = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
INTERN = SimpleNamespace(image_seq_length=9)
PIXELS = torch.zeros(16, 8)


def tiles_of(image: dict, model_type: str = "qwen3_vl", config=QWEN):
    return image_tiles(image, FAMILIES[model_type], config, where="row 3 of the batch")


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_the_grids_of_qwen(model_type):
    image = {"pixel_values": PIXELS, "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 8]])}
    assert tiles_of(image, model_type) == [(Tile(2, 3),), (Tile(1, 4),)]
    assert tiles_of({}, model_type) == []
    merged = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1))
    assert tiles_of(image, model_type, merged)[0] == (Tile(4, 6),)


def test_the_tiles_of_internvl():
    image = {"pixel_values": PIXELS, "image_tile_grid": torch.tensor([[2, 1], [1, 1]])}
    wide, single = tiles_of(image, "internvl", INTERN)
    assert wide == (Tile(3, 3, 0.0, 0.0, 0.5, 1.0), Tile(3, 3, 0.5, 0.0, 1.0, 1.0), Tile(3, 3))
    assert single == (Tile(3, 3),)
    assert tiles_of({}, "internvl", INTERN) == []
    tall = tiles_of({"image_tile_grid": torch.tensor([[1, 2]])}, "internvl", INTERN)[0]
    assert tall == (Tile(3, 3, 0.0, 0.0, 1.0, 0.5), Tile(3, 3, 0.0, 0.5, 1.0, 1.0), Tile(3, 3)), "columns come first"


def test_videos_are_counted_where_their_family_is_known():
    config, video = QWEN, {"video_grid_thw": torch.tensor([[2, 4, 6], [1, 2, 2]])}
    assert video_tokens(video, FAMILIES["qwen3_vl"], config, where="row 3 of the batch") == 12 + 1
    assert video_tokens({}, FAMILIES["internvl"], INTERN, where="row 3 of the batch") == 0
    with refusal("P07", "video") as caught:
        video_tokens(video, FAMILIES["internvl"], INTERN, where="row 3 of the batch")
    assert caught.value.where == "row 3 of the batch"
    with refusal("P19", "video"):
        frames = {"pixel_values_videos": PIXELS}
        video_tokens(frames, FAMILIES["qwen3_vl"], config, where="row 3 of the batch")


@pytest.mark.parametrize(
    "grid", [(2, 4, 4), (1, 3, 4), (1, 4, 5), (1, 0, 4)], ids=["video", "odd height", "odd width", "empty"]
)
def test_a_grid_that_is_not_a_still_image_is_refused(grid):
    with refusal("P07", "still image") as caught:
        tiles_of({"image_grid_thw": torch.tensor([[1, 4, 4], grid])})
    assert str(grid) in caught.value.got
    assert caught.value.where == "row 3 of the batch"


@pytest.mark.parametrize(
    ("model_type", "config", "wanted"), [("qwen3_vl", QWEN, "image_grid_thw"), ("internvl", INTERN, "image_tile_grid")]
)
def test_pixels_without_their_grid_are_refused(model_type, config, wanted):
    with refusal("P19", "without the grid") as caught:
        tiles_of({"pixel_values": PIXELS, "num_patches": torch.tensor([3])}, model_type, config)
    assert caught.value.got == ["num_patches", "pixel_values"]
    assert caught.value.wanted.startswith(wanted)
    assert model_type in caught.value.wanted


# ---------------------------------------------------------------------------------------------------------------- turns

START, END, SYSTEM, USER, ASSISTANT, NEWLINE, OPEN, CLOSE = 200, 201, 202, 203, 204, 205, 206, 207
CHAT = ChatTokens(START, END, {"system": SYSTEM, "user": USER}, NEWLINE, (OPEN, CLOSE))


def turns(ids: list[int], response: int, grids=((1, 4, 4),)) -> tuple[list[int], list[int]]:
    row = plan(ids, response, grids=grids, chat=CHAT)
    return at(row, "system"), at(row, "question")


def test_without_chat_tokens_there_are_no_turns():
    row = plan([1, *[IMAGE] * 4, 2, 7], 1)
    assert set(row.keys) == {"image", "region", "sink", "response"}


def test_the_text_of_a_system_and_a_user_turn():
    ids = [
        *(START, SYSTEM, NEWLINE, 11, 12, END, NEWLINE),  # 0..6, text at 3, 4
        *(
            START,
            USER,
            NEWLINE,
            OPEN,
            *[IMAGE] * 4,
            CLOSE,
            13,
            NEWLINE,
            14,
            END,
            NEWLINE,
        ),  # 7..20: image 11..14, text 16..18
        *(START, ASSISTANT, NEWLINE, 15, 16, END),  # 21..26, response from 24 on
    ]
    row = plan(ids, 3, boxes=[[[0.0, 0.0, 0.5, 0.5]]], chat=CHAT)
    assert at(row, "system") == [3, 4]
    assert at(row, "question") == [16, 17, 18], "a line break inside of a turn is text"
    assert at(row, "image") == [11, 12, 13, 14]
    assert at(row, "sink") == [0]
    assert at(row, "response") == [24, 25, 26]
    together = torch.stack([row.keys[name] for name in ("system", "question", "image", "sink", "response")]).sum(0)
    assert together.max() == 1, "the sets are disjoint"
    frame = [1, 2, 5, 6, 7, 8, 9, 10, 15, 19, 20, 21, 22, 23]
    assert (together == 0).nonzero().flatten().tolist() == frame, "only what frames turns and images is in none"


def test_several_turns_and_earlier_answers():
    ids = [
        *(START, USER, NEWLINE, 11, END, NEWLINE),  # text at 3
        *(START, ASSISTANT, NEWLINE, 12, 13, END, NEWLINE),  # an earlier answer belongs to neither
        *(START, SYSTEM, NEWLINE, 14, END, NEWLINE),  # 13..18, text at 16
        *(START, USER, NEWLINE, 15, 16, END, NEWLINE),  # 19..25, text at 22, 23
        *(START, ASSISTANT, NEWLINE, 17),
    ]
    assert turns(ids, 1, grids=()) == ([16], [3, 22, 23])


def test_role_names_are_text_elsewhere():
    ids = [START, USER, NEWLINE, SYSTEM, 11, USER, ASSISTANT, END, NEWLINE, START, ASSISTANT, NEWLINE, 12]
    assert turns(ids, 1, grids=()) == ([], [3, 4, 5, 6])


def test_a_turn_that_the_policy_sampled_is_not_a_question():
    ids = [START, USER, NEWLINE, 11, END, NEWLINE, START, ASSISTANT, NEWLINE, 12, END, START, USER, NEWLINE, 13]
    assert turns(ids, 6, grids=()) == ([], [3])


def test_turns_without_a_line_break_or_an_end():
    assert turns([START, USER, 11, 12, START, ASSISTANT, NEWLINE, 13], 1, grids=()) == ([], [2, 3])
    assert turns([START, SYSTEM, NEWLINE, 11, START, USER, NEWLINE, 12, 13], 1, grids=()) == ([3], [7])


def test_text_before_the_first_turn_belongs_to_none():
    assert turns([11, 12, START, USER, NEWLINE, 13, END, 14, 15], 1, grids=()) == ([], [5])


def test_an_empty_turn():
    assert turns([START, SYSTEM, NEWLINE, END, NEWLINE, START, USER, NEWLINE, END, 15], 1, grids=()) == ([], [])


class Tokenizer:
    """Encodes what it knows as one token, and everything else as its letters."""

    def __init__(self, **ids: int) -> None:
        self.ids = {"<|im_start|>": 1, "<|im_end|>": 2, "system": 3, "user": 4, "\n": 5, **ids}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "a BOS in front would look like a second token"
        return [self.ids[text]] if text in self.ids else [ord(letter) for letter in text]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_chat_tokens_come_from_the_tokenizer_and_the_family(model_type):
    family = FAMILIES[model_type]
    delimiters = {text: 10 + i for i, text in enumerate(family.delimiters)}
    found = ChatTokens.of(Tokenizer(**delimiters), family)
    assert found == ChatTokens(1, 2, {"system": 3, "user": 4}, 5, (10, 11))


def test_a_tokenizer_without_such_turns_is_refused():
    with refusal("P20", "does not write turns") as caught:
        ChatTokens.of(Tokenizer(), FAMILIES["qwen3_vl"])
    assert set(caught.value.got) == {"<|vision_start|>", "<|vision_end|>"}
    assert caught.value.where == "Tokenizer"
    assert "system_mass" in caught.value.fix


def test_the_turns_of_a_real_template():
    """The tiny task's tokenizer and template: what stands between the turns' frames is found by decoding it."""
    from sayo_verl.tiny.policy import CHAT_TEMPLATE, build_tokenizer
    from sayo_verl.tiny.policy import IMAGE as PAD

    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    content = [{"type": "image"}, {"type": "text", "text": "what colour is the circle ?"}]
    conversation = [{"role": "system", "content": "the square . red"}, {"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace(PAD, PAD * 4) + "red", add_special_tokens=False)["input_ids"]
    row = plan_row(
        torch.tensor(ids),
        1,
        image_token_id=tokenizer.convert_tokens_to_ids(PAD),
        images=[merged_grid(1, 4, 4, 2, where="test")],
        boxes=[],
        coverage=0.5,
        where="row",
        chat=ChatTokens.of(tokenizer, FAMILIES["qwen3_vl"]),
    )
    texts = {name: tokenizer.decode([ids[i] for i in at(row, name)]) for name in ("system", "question", "image")}
    assert texts == {"system": "the square . red", "question": "what colour is the circle ?", "image": PAD * 4}
