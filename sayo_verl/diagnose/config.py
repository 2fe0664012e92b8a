"""Settings of ``sayo diagnose``, without torch: the help of the command shows their defaults."""

from dataclasses import dataclass
from pathlib import Path

from sayo_verl.data.folder import MANIFEST, split_files
from sayo_verl.errors import Rule, raise_first


@dataclass(frozen=True)
class Asked:
    """What is asked of a model.

    Attributes:
        data: a folder of prepared data, of which the validation rows are used, or a parquet file.
        rows: use the first rows only; None: all.
        samples: responses per row.
        temperature: of the sampling; 0 is greedy.
        max_new_tokens: longest response, with the end token; None: what the context leaves, at most ``LONGEST``.
        seed: of the sampling.

    Raises:
        SayoError: W34 for a value out of range.
    """

    data: Path
    rows: int | None = None
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        several_greedy = self.samples > 1 and self.temperature == 0
        wanted = {
            "rows": (self.rows is None or self.rows >= 1, "1 or more"),
            "samples": (self.samples >= 1 and not several_greedy, "1 or more; 1 if --temperature is 0"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        raise_first(
            Rule("W34", not right, "an option is out of range", f"--{name.replace('_', '-')}", f"give {text}",
                 got=getattr(self, name), wanted=text)
            for name, (right, text) in wanted.items()
        )  # fmt: skip

    def files(self) -> list[Path]:
        """The parquet files.

        Raises:
            SayoError: W35 if there is no such file, or a folder is not one of `sayo prepare`.
        """
        if self.data.is_dir() and (self.data / MANIFEST).is_file():
            return list(split_files(self.data)["val"])
        raise_first(
            [
                Rule("W35", not self.data.is_file(), "there are no rows at this path", "--data", "correct the path",
                     got=f"{self.data}, {'a folder without ' + MANIFEST if self.data.is_dir() else 'no such file'}",
                     wanted="a parquet file, or a folder of `sayo prepare`")
            ]
        )  # fmt: skip
        return [self.data]
