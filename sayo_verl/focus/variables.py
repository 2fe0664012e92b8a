"""Variables of the scripts of the anchoring stage: what a script refuses before its job starts."""

from collections.abc import Mapping

from sayo_verl.errors import Rule, raise_first
from sayo_verl.script_variables import BY_SCRIPT, refuse_unread

# Variables that the scripts of this stage read in earlier versions, and their replacements. REGION is not among them:
# clouds set it.
UNREAD = {
    "NGPUS": "NGPUS_PER_NODE=N in front of the script",
    "TRAIN_FILE": "train_files=",
    "VAL_FILE": "val_file=",
    "POLICY": "MODEL_PATH=FOLDER in front of the script",
    "CACHE": "DATA= and MODEL_PATH= in front of the script, made by `sayo prepare synthetic` and `sayo prepare policy`",
    "RESPOND": "sample=true or sample=false after the script",
    "ROWS": "respond.max_rows=N, or respond.max_rows=null for all rows, after the script",
    "RESPONSE_ROWS": "respond.max_rows=N, or sample=false in place of 0, after the script",
    "TRIES": "respond.tries=",
    "SAMPLE_BATCH_SIZE": "respond.batch_size=",
    "MAX_RESPONSE_LENGTH": "respond.max_new_tokens=",
    "WEIGHT": "train.weight=",
    "ALPHA": "train.alpha=",
    "STEPS": "train.steps=",
    "BATCH_SIZE": "train.batch_size=",
    "ACCUMULATION": "train.accumulation=",
    "LORA_RANK": "train.lora_rank=",
    "LR": "train.learning_rate=",
    "WARMUP_STEPS": "train.warmup_steps=",
    "MAX_TOKENS": "train.max_tokens=",
    "ATTENTION": "train.attention=",
}


def refuse_variables(environment: Mapping[str, str]) -> None:
    """In a script's run, refuse variables of the scripts that this stage cannot follow.

    Raises:
        SayoError: L67 for a variable that the scripts do not read, F28 for another method or several machines.
    """
    refuse_unread(UNREAD, environment)
    if not environment.get(BY_SCRIPT):
        return
    method, nodes = environment.get("METHOD", ""), environment.get("NNODES", "")
    raise_first(
        [
            Rule(
                "F28",
                method not in ("", "faithful"),
                "the anchoring stage belongs to the method faithful",
                where="METHOD",
                got=method,
                wanted="faithful",
                fix="leave METHOD out; train another method with bash scripts/run.sh",
            ),
            Rule(
                "F28",
                nodes not in ("", "1"),
                "the anchoring stage runs on one machine (torchrun --standalone)",
                where="NNODES",
                got=nodes,
                wanted="1",
                fix="leave NNODES out; NGPUS_PER_NODE is the number of GPUs of this machine",
            ),
        ]
    )
