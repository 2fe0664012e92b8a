"""``<Focus>``: one token in the tokenizer, one row of the embedding, the end of every generation prompt.

The chat template writes it right after the assistant's header, so it belongs to the prompt. A rollout begins after it,
and verl and vLLM need no change.

It is an added but not a *special* token. Decoding removes special tokens: if a policy wrote one, a reward function
would still see a valid format. As plain text, ``<Focus>`` in a response breaks the format and costs the reward.
"""

from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from sayo_verl.errors import SayoError

FOCUS = "<Focus>"
# The new input embedding is the mean over these words' tokens (ours).
INITIAL_WORDS = " focus on the image region"
HEADER = "<|im_start|>assistant\n"
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}],
)


def focus_template(template: str) -> str:
    """A chat template whose generation prompt ends in ``<Focus>``; such a template is returned unchanged.

    A template writes the generation prompt last. So text that is appended under the same condition follows it.
    """
    addition = "{%- if add_generation_prompt -%}{{- '" + FOCUS + "' -}}{%- endif -%}"
    return template if template.endswith(addition) else template.removesuffix("\n") + addition


def set_template(processor: Any) -> None:
    """Give ``processor`` and its tokenizer the template with ``<Focus>``, after a comparison of their outputs.

    Raises:
        SayoError: F01 for a generation prompt that does not end with the assistant's header, F02 when the templates
            differ in more than the token.
    """
    old, new = processor.chat_template, focus_template(processor.chat_template)
    for messages in _PROBES:
        for prompt in (False, True):
            texts = [
                processor.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (old, new)
            ]
            if prompt and not texts[0].removesuffix(FOCUS).endswith(HEADER):
                raise SayoError(
                    "F01",
                    "the chat template opens the response itself",
                    where="chat_template",
                    got=repr(texts[0][-40:]),
                    wanted=f"a generation prompt that ends in {HEADER!r}",
                    fix="use the Instruct model of the family",
                )
            if texts[1] != texts[0].removesuffix(FOCUS) + FOCUS * prompt:
                raise SayoError(
                    "F02",
                    "the chat template cannot be extended by a token at its end",
                    where="chat_template",
                    got=repr(texts[1][-40:]),
                    wanted=f"the prompt and {FOCUS}",
                    fix="write the generation prompt last in the template",
                )
    processor.chat_template = processor.tokenizer.chat_template = new


@torch.no_grad()
def add_focus_token(model: nn.Module, processor: Any) -> int:
    """Put ``<Focus>`` into tokenizer, chat template and model, in place; a second call changes nothing.

    A spare row of the embedding is used if the model has more rows than the tokenizer has tokens, as the Qwen
    families do. Otherwise the embedding grows by one row. The input row is the mean over ``INITIAL_WORDS``. If the
    output layer is not tied to the embedding, its row is a copy of the image placeholder's, which a policy does not
    write.

    Args:
        model: a Hugging Face model that is not wrapped yet, weights present.
        processor: the model's own.

    Returns:
        The token's id.

    Raises:
        SayoError: F01 and F02 for a chat template that cannot take it, F03 for a tokenizer that splits it, F04 for a
            tokenizer that has the token with a model that has no row for it.
    """
    tokenizer: Any = processor.tokenizer
    network: Any = model
    rows = network.get_input_embeddings().weight.shape[0]
    known = FOCUS in tokenizer.get_vocab()
    set_template(processor)
    if not known:
        tokenizer.add_tokens([AddedToken(FOCUS, special=False, normalized=False)])
    focus = focus_token_id(processor)
    if known:
        if focus >= rows:
            raise SayoError(
                "F04",
                f"the tokenizer has {FOCUS}, the model has no row for it",
                where="add_focus_token",
                got=f"id {focus}, {rows} rows",
                wanted="model and processor of one folder",
                fix="load both from the same folder",
            )
        return focus
    if focus >= rows:
        network.resize_token_embeddings(focus + 1, mean_resizing=False)
    embedding = network.get_input_embeddings().weight
    words = tokenizer.encode(INITIAL_WORDS, add_special_tokens=False)
    embedding[focus] = embedding[words].float().mean(0).to(embedding.dtype)
    output = network.get_output_embeddings().weight
    if output.data_ptr() != embedding.data_ptr():
        output[focus] = output[network.config.image_token_id]
    return focus


def focus_token_id(processor: Any) -> int:
    """The id of ``<Focus>``.

    Raises:
        SayoError: F03 when the tokenizer does not have it as one token.
    """
    ids = processor.tokenizer.encode(FOCUS, add_special_tokens=False)
    if len(ids) != 1:
        raise SayoError(
            "F03",
            f"{FOCUS} is not one token",
            where=type(processor.tokenizer).__name__,
            got=ids,
            wanted="one id",
            fix="use a folder that the anchoring stage wrote",
        )
    return ids[0]
