"""Prompts that ask for the form of answer that ``sayo_verl.reward`` rewards."""

IMAGE_TAG = "<image>"
# Asks for what ``sayo_verl.reward`` rewards; without it a model that was not trained to answer so begins at format 0.
INSTRUCTION = "Think first, then answer with a word or a short phrase: <think> ... </think> <answer> ... </answer>"
# The system turn of SAYO's released training code, word for word: train/main.py of github.com/Cratileo/Sayo at 63be688.
RELEASED_SYSTEM = (
    "A conversation between a user and an assistant. The user asks a question, and the assistant must answer it."
    "The assistant first conducts internal reasoning, followed immediately by the final answer enclosed within "
    "<answer>...</answer> tags."
    "Requirements:"
    "1. The reasoning outside <answer></answer> should be concise, minimal, and essential.\n"
    "2. The final answer must be correct, complete, and directly address the user\u2019s question.\n"
    "3. When reasoning, focus on the areas of aim object in the image.\n"
    "4. You MUST HAVE thinking process before the final answer.\n"
)
# What a prompt holds beside the question: an instruction below it, the released system turn above it, or nothing.
PROMPTS = ("instruction", "released", "question")
QUESTION_FIELD = "{question}"  # of a template


def messages_of(question: str, n_images: int, prompt: str) -> list[dict[str, str]]:
    """The prompt of a row.

    Args:
        question: without image tags.
        n_images: image tags above the question.
        prompt: "instruction": ``INSTRUCTION`` stands below the question; "released": a system turn stands above it;
            "question": neither; any other text: a template with ``{question}``.
    """
    text = {"instruction": f"{question}\n{INSTRUCTION}", "released": question, "question": question}.get(prompt)
    if text is None:
        text = prompt.replace(QUESTION_FIELD, question)
    system = [{"role": "system", "content": RELEASED_SYSTEM}] if prompt == "released" else []
    return [*system, {"role": "user", "content": IMAGE_TAG * n_images + text}]
