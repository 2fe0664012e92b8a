"""A process that answers prompts with vLLM: ``python -m sayo_verl.look.vllm_answers PROMPTS.json ANSWERS.json``.

``sayo_verl.look.answer`` writes the first file and reads the second: for each prompt the ids that vLLM made of it, and
the ids of the response.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any


def main(asked: Path, answered: Path) -> None:
    """Answer the prompts of a file."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    job: dict[str, Any] = json.loads(asked.read_text())
    prompts, sampling = job["prompts"], job["sampling"]
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=job["eager"],
        limit_mm_per_prompt={"image": max(len(prompt["images"]) for prompt in prompts)},
        seed=sampling["seed"],
        generation_config="vllm",  # not the model's penalties
    )
    params = SamplingParams(
        temperature=sampling["temperature"],
        max_tokens=sampling["max_new_tokens"],
        seed=sampling["seed"],
        stop_token_ids=job["ends"],
        logit_bias=dict.fromkeys(job["placeholders"], -100.0),  # a sampled placeholder would be an image without pixels
    )
    inputs = [
        {
            "prompt_token_ids": prompt["ids"],
            "multi_modal_data": {
                "image": [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in prompt["images"]]
            },
        }
        for prompt in prompts
    ]
    outputs = engine.generate(inputs, params, use_tqdm=False)
    results = [
        {"prompt_ids": list(output.prompt_token_ids), "ids": list(output.outputs[0].token_ids)} for output in outputs
    ]
    answered.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
