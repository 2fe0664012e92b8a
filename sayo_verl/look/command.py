"""Where a model looks while it answers, as one HTML page: it answers a question about an image, or rows of a
parquet file, and its attention is measured in one pass, exactly and with its own attention kernel.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sayo_verl.command_line import check_ranges, progress_bar
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.view.seen import MOST_BORDER, SeenPrompt, SeenResponse

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from sayo_verl.look.observe import Observer

PAGE_BYTES = 6_000_000  # of maps on a page, for all rows
DTYPES = ("float32", "bfloat16", "float16")
ROWS = "0"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sayo look`."""
    parser.description = __doc__
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder or hub name of a supported model")
    add("--image", action="append", default=[], metavar="FILE", help="picture to ask about; several: repeat the flag")
    add("--question", metavar="TEXT", help="about the pictures of --image")
    add("--data", type=Path, metavar="PATH", help="instead of --image: parquet file or folder of prepared rows")
    add("--rows", metavar="N", help=f"rows of --data, such as 3, 0:8 or 0:4,9 (default: {ROWS})")
    add("--response", metavar="TEXT", help="look at this text instead of an answer of the model")
    add("--boxes", action="append", type=_box, default=[], metavar="BOX",
        help="x0,y0,x1,y1 as shares of the first picture of --image; several: repeat")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 1024, or what the context leaves)")
    add("--temperature", type=float, default=0.0, metavar="X", help="of the sampling; 0 is greedy (default)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    add("--engine", choices=("auto", "transformers", "vllm"), default="auto",
        help="that answers; auto: vllm on a GPU if it is installed, else transformers")  # fmt: skip
    add("--maps", metavar="NAMES", help="maps per word: mean, L24 (a layer), L24H5 (a head), with commas "
        "(default: the mean, and as many layers as fit)")  # fmt: skip
    add("--layers", metavar="N", help="layers of the mean, such as 20,24 or -1 (default: all of full attention)")
    add("--heads", action="store_true", help="also maps of single heads over the whole response")
    add("--query-row", choices=("input", "predicting"), default="input",
        help="row of a token: where it is the input (default), or that predicted it")  # fmt: skip
    add("--coverage", type=float, default=0.5, metavar="X", help="share of a cell that a box must cover "
        "(default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("look.html"), metavar="FILE", help="the page (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers and maps")
    add("--png", type=Path, metavar="PATH", help="also write a picture; for several rows a folder of pictures")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the first GPU, else the CPU)")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU")
    parser.show_only(  # type: ignore[attr-defined]
        "--model", "--image", "--question", "--data", "--rows", "--response", "--boxes", "--maps", "--out", "--json",
        "--png",
    )  # fmt: skip


def _box(text: str) -> list[float]:
    """Four numbers."""
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{len(numbers)} numbers, wanted x0,y0,x1,y1")
    return numbers


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not belong together, before a model library is loaded.

    Raises:
        SayoError: W01, W04, W07, W15, W17, W34.
    """
    wanted = {
        "temperature": (0 <= args.temperature < float("inf"), "0 or more"),
        "max_new_tokens": (args.max_new_tokens is None or args.max_new_tokens >= 1, "1 or more"),
        "seed": (args.seed >= 0, "0 or more"),
        "coverage": (0 < args.coverage <= 1, "a number above 0, at most 1"),
    }
    check_ranges(vars(args), wanted)
    numbers = row_ranges(args.rows or ROWS)
    several = len(numbers) > 1 or any(last is None or last - first > 1 for first, last in numbers)
    one_source = "give --image FILE --question TEXT, or --data FILE --rows 0:8"
    raise_first(
        [
            Rule("W01", bool(args.image) == (args.data is not None), "there must be one source of images",
                 "--image and --data", one_source, got="both" if args.image else "neither", wanted="one of them"),
            Rule("W01", args.data is not None and bool(args.question or args.boxes),
                 "--question and --boxes belong to --image", "--data", "remove them: rows have their own"),
            Rule("W01", bool(args.image) and args.rows is not None, "--rows belongs to --data", "--rows", "remove it"),
            Rule("W04", bool(args.image) and not (args.question or "").strip(), "the question is empty", "--question",
                 'ask something: --question "..."'),
            Rule("W07", args.response is not None and not args.response, "the response is empty", "--response",
                 "give a text, or leave the flag out: the model then answers"),
            Rule("W17", args.png is not None and several and args.data is not None and args.png.suffix == ".png",
                 "several rows make several pictures", "--png", "name a folder", got=args.png),
        ]
    )  # fmt: skip


def row_ranges(text: str) -> list[tuple[int, int | None]]:
    """``3,0:8`` as pairs of the first row and the row after the last, None for the end.

    Raises:
        SayoError: W15.
    """
    found: list[tuple[int, int | None]] = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        numbers = [first or "0", last or "0"] if colon else [first]
        if not all(n.isdecimal() for n in numbers):
            raise SayoError(
                "W15",
                "this is no choice of rows",
                where="--rows",
                got=text,
                wanted="numbers from 0 and slices, such as 3 or 0:8 or 0:4,9",
                fix="correct it",
            )
        start = int(numbers[0])
        found.append((start, (int(last) if last else None) if colon else start + 1))
    return found


def rows_of(data: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows by their numbers, each with its name.

    Args:
        data: a parquet file, or a folder: its validation files, or all files if it has none; rows are counted through.
        text: of ``--rows``.

    Raises:
        SayoError: W15 for a choice that is no choice or empty, W16 for a row or a file that does not exist, D02 for a
            damaged file.
    """
    from sayo_verl.data.reading import open_parquet, read_rows

    files = sorted(data.glob("val*.parquet")) or sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    if not files or not files[0].is_file():
        raise SayoError(
            "W16",
            "there are no rows at this path",
            where="--data",
            got=data,
            wanted="a parquet file, or a folder with parquet files",
            fix="correct the path",
        )
    opened = [(path, open_parquet(path)) for path in files]
    total = sum(file.metadata.num_rows for _, file in opened)
    chosen: list[int] = []
    for first, last in row_ranges(text):
        end = total if last is None else last
        if first >= total or end > total:
            raise SayoError(
                "W16",
                "a row does not exist",
                where="--rows",
                got=first if end <= first + 1 else f"{first}:{end}",
                wanted=f"0 to {total - 1}, or slices up to {total}, in {', '.join(path.name for path in files)}",
                fix="choose other rows",
            )
        chosen += range(first, end)
    if not chosen:
        raise SayoError("W15", "no row is chosen", where="--rows", got=text, fix="give a slice such as 0:8")
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    passed = 0
    for path, file in opened:
        names = [name for name in file.schema_arrow.names if name != "response"]
        for number, row in enumerate(read_rows(file, path, names)):
            if passed + number in chosen:
                found[passed + number] = f"row {number} of {path.name}", row
            if passed + number >= max(chosen):
                break
        passed += file.metadata.num_rows
    return [found[n] for n in dict.fromkeys(chosen)]


def run(args: argparse.Namespace) -> int:
    """Answer, measure, write, and print what there is to see."""
    check(args)
    rows = rows_of(args.data, args.rows or ROWS) if args.data is not None else None
    import torch
    from transformers.utils import logging

    from sayo_verl.look.answer import accuracy_of, answers, chosen_engine
    from sayo_verl.look.observe import Observer
    from sayo_verl.look.prompt import row_of_images

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if rows is None:
        rows = [(", ".join(Path(i).name for i in args.image), row_of_images(args.image, args.question, args.boxes))]
    observer = Observer(
        args.model,
        device=_device(args.device),
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        coverage=args.coverage,
        layers=_numbers(args.layers) if args.layers else None,
        query_row=args.query_row,
    )
    maps = [name.strip() for name in args.maps.split(",")] if args.maps else None
    observer.check_maps(maps or ())
    prompts = [observer.prompt(row, where) for where, row in rows]
    engine = "a given text" if args.response is not None else chosen_engine(args.engine, observer.device)
    facts: dict[str, str | float] = {"engine": engine}
    if args.response is None:
        facts |= {"temperature": args.temperature, "seed": args.seed}
    seen: list[tuple[SeenPrompt, SeenResponse]] = []
    with progress_bar() as progress:
        notes: list[str] = []
        if args.response is not None:
            given, notes = given_response(observer, args.response)
            ids = [given] * len(prompts)
        else:
            task = progress.add_task(f"answering with {engine}", total=len(prompts))
            settings = {name: getattr(args, name) for name in ("engine", "max_new_tokens", "temperature", "seed")}
            ids = answers(observer, prompts, **settings, tick=lambda n: progress.advance(task, n))
        measuring = progress.add_task("measuring", total=len(prompts))
        for prompt, (_, row), response in zip(prompts, rows, ids, strict=True):
            cut = args.response is None and bool(response) and response[-1] not in observer.ends
            more = [f"The answer was cut at {len(response)} tokens (--max-new-tokens)."] if cut else []
            text = observer.processor.tokenizer.decode(response, skip_special_tokens=True)
            accuracy = accuracy_of(row, text)
            scored = {} if math.isnan(accuracy) else {"accuracy": accuracy}
            budget = PAGE_BYTES // len(prompts)
            one = observer.observe(
                prompt,
                response,
                maps=maps,
                heads=args.heads,
                budget=budget,
                facts=facts | scored,
                notes=[*notes, *more],
            )
            seen.append((prompt.seen, one))
            progress.advance(measuring)
    about = {
        "model": args.model,
        "data": ", ".join(args.image) if args.data is None else str(args.data),
        **{label: _named(seen[0][1].facts[name]) for name, label in ABOUT.items() if name in seen[0][1].facts},
    }
    if about.get("temperature") == "0":
        about["temperature"] = "0 (greedy)"
    _write(args, seen, about)
    for of_prompt, one in seen:
        print(f"{of_prompt.where}: {' '.join(one.text.split())[:200]!r}")
        for line in in_words(one):
            print(f"  {line}")
    return 0


ABOUT = {  # facts that are equal for all rows -> their names on the page
    "engine": "answered by",
    "temperature": "temperature",
    "seed": "seed",
    "dtype": "type of numbers",
    "attention_kernel": "attention kernel",
    "layers": "layers of the mean",
    "query_row": "row of attention",
}
ROWS_OF_ATTENTION = {"input": "the token as input", "predicting": "the row that predicted the token"}


def _named(fact: str | float) -> str:
    """A fact in words."""
    return ROWS_OF_ATTENTION.get(str(fact), f"{fact:g}" if isinstance(fact, float) else str(fact))


def given_response(observer: "Observer", text: str) -> tuple[list[int], list[str]]:
    """Ids of a text and the end token, and what a reader must know about them."""
    tokenizer = observer.processor.tokenizer
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    notes = ["The text was tokenised by the model's tokenizer; a policy that wrote it may have used other tokens."]
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        notes.append("The tokens do not give the text back exactly: the tokenizer changed it.")
    if observer.ends and (not ids or ids[-1] not in observer.ends):
        ids.append(observer.ends[0])
    return ids, notes


def in_words(response: SeenResponse) -> list[str]:
    """Whether the answer is right, if that is known; attention to the image, the boxes (else the top word), sinks."""
    facts, values = response.facts, response.values

    def share(name: str) -> str:
        return f"{100 * float(facts[name]):.1f} %"

    lines = []
    if "accuracy" in facts:
        accuracy = float(facts["accuracy"])
        verdict = "right" if accuracy >= 1 else f"partly right ({accuracy:g})" if accuracy > 0 else "wrong"
        lines.append(f"The answer is {verdict}.")
    lines += [f"Its {facts['tokens']} tokens put {share('image_mass')} of their attention on the image, on average."]
    if "region_share" in facts:
        lines.append(
            f"Of that, {share('region_share')} went to the boxes, where looking everywhere alike would give "
            f"{share('region_chance')} (R_a of single tokens {float(facts['R_a_single']):.2f}; 0.5 is no preference)."
        )
    else:
        means = [float(values["image_mass"][first:end].mean()) for first, end in response.words]
        most = means.index(max(means))
        first, end = response.words[most]
        word = "".join(response.pieces[first:end]).strip()
        lines.append(f"The word that looked most at the image is {word!r}: {100 * means[most]:.1f} %.")
    first_token = f"he first token got {share('sink_mass')} of all attention."
    if float(facts["border_chance"]) > MOST_BORDER:
        return [*lines, f"T{first_token}"]
    border = (
        f"The border of the image got {share('border_share')} of the attention to the image, with "
        f"{share('border_chance')} of the visual tokens"
    )
    return [*lines, f"{border}; t{first_token}"]


def _numbers(text: str) -> list[int]:
    """Layer numbers.

    Raises:
        SayoError: P03.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SayoError(
            "P03",
            "these are no layer numbers",
            where="--layers",
            got=text,
            wanted="numbers with commas, such as 20,24 or -1",
            fix="correct them",
        ) from error


def _device(name: str | None) -> str | None:
    """The device, if there is one of this name.

    Raises:
        SayoError: W19.
    """
    import torch

    try:
        if name is not None:
            torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise SayoError(
            "W19",
            f"this device cannot be used ({str(error).splitlines()[0][:120]})",
            where="--device",
            got=name,
            fix="leave the flag out, or name cpu",
        ) from error
    return name


def _write(args: argparse.Namespace, seen: Sequence[tuple[SeenPrompt, SeenResponse]], about: Mapping[str, str]) -> None:
    """The page, and on request JSON and pictures; prints their paths.

    Raises:
        SayoError: W18.
    """
    from sayo_verl.look.page import write_page
    from sayo_verl.view.store import prompt_to_json, response_to_json

    title = f"Where {Path(args.model).name} looks"
    path = args.out
    try:
        for path in (p for p in (args.out, args.json, args.png) if p is not None):
            path.parent.mkdir(parents=True, exist_ok=True)
        path = args.out
        shown = [
            (prompt, replace(one, facts={name: fact for name, fact in one.facts.items() if name not in ABOUT}))
            for prompt, one in seen
        ]
        write_page(path, title, shown, about)
        print(f"page: {path}")
        if args.json:
            path = args.json
            items = [{"prompt": prompt_to_json(prompt), "response": response_to_json(one)} for prompt, one in seen]
            path.write_text(json.dumps({"about": dict(about), "items": items}) + "\n", encoding="utf-8")
            print(f"numbers and maps: {path}")
        if args.png:
            from sayo_verl.view.picture import save_png

            path = args.png
            single = len(seen) == 1 and path.suffix == ".png"
            if not single:
                path.mkdir(exist_ok=True)
            for n, (prompt, one) in enumerate(seen):
                save_png(prompt, one, path if single else path / f"{n:03d}.png")
            print(f"picture{'' if single else 's'}: {path}")
    except OSError as error:
        raise SayoError(
            "W18",
            f"a file cannot be written ({error.strerror})",
            where=str(path),
            fix="name a file in a folder that can be written",
        ) from error
