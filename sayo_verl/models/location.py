"""Where a model is: a folder of this machine, or a name of the hub. No model library is imported."""

import functools
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from sayo_verl.errors import SayoError

# Configuration, processor and tokenizer: some 20 MB of a hub model, none of its weights.
SMALL_FILES = ["*.json", "*.jinja", "*.txt"]


def is_hub_name(path: str) -> bool:
    """Whether transformers looks a model path up on the hub: it reads "owner/name", and no such folder exists here."""
    return not path.startswith(("/", ".", "~")) and path.count("/") == 1 and not Path(path).exists()


def model_folder(path: str, *, where: str, dry_run: bool) -> Path | None:
    """The folder that holds a model's configuration and, where it has them, its processor and tokenizer.

    For a hub name it is the snapshot in the hub's cache, whose small files are downloaded if they are missing. If a
    folder of the owner's name exists here, the name may also be the path of a future model: a dry run does not refuse
    it.

    Args:
        path: folder or hub name.
        where: the setting that names it.
        dry_run: return None if the model is not on this machine, instead of an error.

    Returns:
        The folder.

    Raises:
        SayoError: L17 for a path without a model and for a name that the hub refuses; L53 if the hub cannot be reached.
    """
    if not is_hub_name(path):
        folder = Path(path).expanduser()
        if folder.exists():
            return folder
        if dry_run:
            return None
        raise SayoError(
            "L17",
            "there is no model at this path",
            where=where,
            got=path,
            fix="correct it, or give a hub name such as Qwen/Qwen3-VL-8B-Instruct",
        )
    owner = Path(path).parent
    maybe_path = owner.is_dir()
    found = _hub_folder(path)
    if isinstance(found, Path):
        return found
    if dry_run and maybe_path:
        return None
    neither = f", and the folder {owner} here has none of this name" if maybe_path else ""
    if isinstance(found, RepositoryNotFoundError | HFValidationError):
        what = f"the hub has no such model, or does not show it to you{neither}"
        raise SayoError(
            "L17",
            what,
            where=where,
            got=path,
            fix=f"correct the {'path or the ' if neither else ''}name; for a gated or private model: hf auth login",
        ) from found
    if dry_run:
        return None
    cause = found.__cause__ or found
    raise SayoError(
        "L53",
        f"the hub cannot be reached, and the model is not in its cache{neither}",
        where=where,
        got=f"{path}, {type(cause).__name__}: {' '.join(str(cause).split())[:120]}",
        fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; without a network, give the folder of a "
        f"download (hf download {path})",
    )


def check_config_file(folder: Path, path: str, *, where: str) -> None:
    """Refuse a model folder without config.json.

    Args:
        folder: of ``model_folder``.
        path: folder or hub name, as the user gave it.
        where: the setting that names it.

    Raises:
        SayoError: L17.
    """
    if not (folder / "config.json").is_file():
        raise SayoError(
            "L17",
            "the model folder has no config.json",
            where=where,
            got=path,
            fix="point to a folder in Hugging Face format",
        )


def why_absent(path: str) -> str:
    """What a plan says of a model for which ``model_folder`` returned None."""
    if not is_hub_name(path):
        return "NOT THERE YET, needed before the run"
    if Path(path).parent.is_dir():
        return "NOT THERE YET as a folder, and not found on the hub"
    return "the hub cannot be reached from here"


@functools.cache
def _hub_folder(name: str) -> Path | Exception:
    """The snapshot of a hub model, or the error. The hub is asked once per process."""
    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    except HFValidationError as error:
        return error
    except (OSError, httpx.HTTPError) as error:
        cached = try_to_load_from_cache(name, "config.json")  # of a snapshot that lacks some of the files
        return Path(cached).parent if isinstance(cached, str) else error
