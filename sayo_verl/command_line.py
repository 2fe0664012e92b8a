"""Parsers of the ``sayo`` command: subcommands that add their flags late, short help, flags of dataclasses.

The ``--help`` of a subcommand fits a screen; ``--help-all`` shows the rest, if there is more.
"""

import argparse
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from sayo_verl.errors import Rule, raise_first

if TYPE_CHECKING:
    from rich.progress import Progress

Config = TypeVar("Config")
Run = Callable[[argparse.Namespace], int]
AddFlags = Callable[[argparse.ArgumentParser], Run | None]


class Command(argparse.ArgumentParser):
    """A parser that adds its flags when it begins to parse: argparse lets only the chosen subcommand's parser do so.

    Attributes:
        shown: names of the optional flags on the page of ``--help``; None for all.
        intermixed: whether flags may stand between positional arguments.
    """

    def __init__(self, *args: Any, add_flags: AddFlags | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        self.add_flags = add_flags
        self.shown: frozenset[str] | None = None
        self.intermixed = False

    def show_only(self, *flags: str) -> None:
        """Leave other optional flags, and all but the first paragraph of the description, to ``--help-all``."""
        self.shown = frozenset({"-h", "--help-all", *flags})
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="the whole page, with every option")

    def format_help(self) -> str:
        if self.shown is None:
            return super().format_help()
        hidden = [a for a in self._actions if not (a.required or self.shown & set(a.option_strings))]
        before = [action.help for action in hidden], [group.description for group in self._action_groups]
        self.epilog = "more options: --help-all" if hidden else None
        hidden += [a for a in self._actions if hidden and isinstance(a, _HelpAll)]
        before[0].extend(a.help for a in hidden[len(before[0]) :])
        described, self.description = self.description, _first_paragraph(self.description or "")
        self.usage = self._short_usage()
        for action in hidden:
            action.help = argparse.SUPPRESS
        for group in self._action_groups:
            group.description = None
        try:
            return super().format_help()
        finally:
            self.description, self.usage, self.epilog = described, None, None
            for action, text in zip(hidden, before[0], strict=True):
                action.help = text
            for group, text in zip(self._action_groups, before[1], strict=True):
                group.description = text

    def format_usage(self) -> str:
        """The short usage of a command that leaves options to ``--help-all``; argparse prints it with an error."""
        return super().format_usage() if self.shown is None else f"usage: {self._short_usage()}\n"

    def _short_usage(self) -> str:
        required = [f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in self._actions if a.required]
        return textwrap.fill(" ".join([self.prog, *required, "[OPTION ...]"]), 72, subsequent_indent=" " * 11)

    def error(self, message: str) -> NoReturn:
        """End with the usage and the message, and the help of each option that is missing.

        Raises:
            SystemExit: 2.
        """
        what, _, names = message.partition(": ")
        if what == "the following arguments are required":
            for action in self._actions:
                if action.option_strings and "/".join(action.option_strings) in names.split(", "):
                    message += f"\n  {action.option_strings[0]}: {action.help}"
        super().error(message)

    def parse_known_args(self, args=None, namespace=None):
        if self.add_flags:
            add_flags, self.add_flags = self.add_flags, None
            self.set_defaults(function=add_flags(self))
        if self.intermixed:
            self.intermixed = False  # argparse calls this function again meanwhile
            try:
                return self.parse_known_intermixed_args(args, namespace)
            finally:
                self.intermixed = True
        return super().parse_known_args(args, namespace)


class _HelpAll(argparse.Action):
    """``--help-all``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Command)
        parser.shown = None
        parser.print_help()
        parser.exit()


def _first_paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.strip().split("\n\n")[0].split()), 78)


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, AddFlags]]) -> None:
    """Subcommands by name, each with one line of help and the function that adds its flags."""
    choices = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    for name, (summary, add_flags) in commands.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        choices.add_parser(name, help=summary, description=description, add_flags=add_flags)


def add_config_flags(
    parser: argparse.ArgumentParser, config: type, prefix: str = "", leave_out: Collection[str] = ()
) -> None:
    """One flag for each field of a configuration dataclass, with its default; not for the fields of ``leave_out``."""
    hints = get_type_hints(config)
    group = parser.add_argument_group(config.__name__, inspect.getdoc(config))
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        hint = hints[field.name]
        kwargs: dict[str, Any] = {"default": field.default, "help": "(default: %(default)s)"}
        if get_origin(hint) is tuple:
            kwargs.update(nargs="*", type=get_args(hint)[0])
        elif get_args(hint):
            kwargs.update(choices=get_args(hint), help=f"one of {', '.join(get_args(hint))} (default: %(default)s)")
        else:
            kwargs.update(type=hint)
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}", dest=f"{config.__name__}.{field.name}", metavar="X", **kwargs
        )


def config_from(args: argparse.Namespace, config: Callable[..., Config]) -> Config:
    """The dataclass from the flags that ``add_config_flags`` made."""
    return config(**_given(args, f"{config.__name__}."))


def add_task_flags(parser: argparse.ArgumentParser, tasks: Mapping[str, type]) -> None:
    """The flags of several configurations, of which ``task_config`` makes one. A field of several has one flag."""
    added = dict[str, dict[str, object]]()
    for task, config in tasks.items():
        add_config_flags(parser, config, leave_out=added)
        for field in dataclasses.fields(config):
            added.setdefault(field.name, {})[task] = field.default
    for action in parser._actions:
        owner, _, name = action.dest.partition(".")
        if name and owner in [config.__name__ for config in tasks.values()]:
            shown = {t: " ".join(v) if isinstance(v, tuple) else v for t, v in added[name].items()}
            same = len(set(map(str, shown.values()))) == 1 and len(shown) == len(tasks)
            of_task = [f"{task}: {value}" for task, value in shown.items()]
            text = f"default: {next(iter(shown.values()))}" if same else "; ".join(of_task)
            action.help = (action.help or "").replace("default: %(default)s", text)
            action.default = None  # so that a flag which the task does not read is seen


def task_config(args: argparse.Namespace, tasks: Mapping[str, type], task: str) -> Any:
    """The configuration of a task from the flags of ``add_task_flags``.

    Raises:
        SayoError: D83 for a flag that the task does not read.
    """
    given = dict[str, Any]()
    for config in tasks.values():
        given |= {name: value for name, value in _given(args, f"{config.__name__}.").items() if value is not None}
    read = [field.name for field in dataclasses.fields(tasks[task])]
    raise_first(unread_by_task(name, task) for name in given if name not in read)
    return tasks[task](**given)


def unread_by_task(name: str, task: str) -> Rule:
    """D83."""
    flag = f"--{name.replace('_', '-')}"
    return Rule(
        "D83", True, "the task does not read this option", flag, "remove it, or name its task", f"--task {task}"
    )


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Values of the flags whose destination begins with ``prefix``, by the rest of it."""
    values = {k.removeprefix(prefix): v for k, v in vars(args).items() if k.startswith(prefix)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def check_ranges(given: Mapping[str, object], wanted: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse options out of range.

    Args:
        given: name of the option -> its value.
        wanted: name -> whether the value is right, and the range in words.

    Raises:
        SayoError: W34.
    """
    raise_first(
        Rule("W34", not right, "an option is out of range", f"--{name.replace('_', '-')}", f"give {text}",
             got=given[name], wanted=text)
        for name, (right, text) in wanted.items()
    )  # fmt: skip


def progress_bar() -> "Progress":
    """A bar that vanishes when it is done. In a log, where rich would leave an empty line instead, there is none."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_interactive)
