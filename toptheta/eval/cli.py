"""Reading a script's settings from flags or a saved run."""

import argparse
import sys
import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from toptheta.eval.rules import check_settings, flag, without_effect
from toptheta.eval.settings import RUN, AnySettings, Settings
from toptheta.eval.slurm import SlurmOptions
from toptheta.util.errors import UsageError
from toptheta.util.options import add_flags, from_flags, from_json
from toptheta.util.parser import StrictParser

COMMANDS = {"test_llama.py": "toptheta-qa", "gen_llama.py": "toptheta-gen"}
RESUMING = ("resume", "timestamps", *(f.name for f in fields(SlurmOptions)))  # flags that go together


class _Help(argparse.Action):
    """--help, and --help TOPIC."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_topics() if values is None else parser.format_topic(values), end="")
        parser.exit()


class Parser(StrictParser):
    """topics: whether --help lists the flags on one screen and --help TOPIC explains those of one group."""

    def __init__(self, topics: bool = False, **options: Any):
        super().__init__(**options, add_help=not topics)
        if topics:
            words = "explain the flags of one topic, or of 'all' topics"
            self.add_argument("-h", "--help", action=_Help, metavar="TOPIC", help=words)

    def format_topics(self) -> str:
        """One screen: what the program does, and its flags by topic."""
        topics = self._topics()
        lines = [
            f"usage: {self.prog} [--help TOPIC] [FLAG ...]",
            "",
            *textwrap.wrap(self.description or "", 79),
        ]
        lines += ["", "--help TOPIC explains the flags of one topic, --help all every flag.", ""]
        width = 2 + max(map(len, topics))
        for name, group in topics.items():
            flags = " ".join(action.option_strings[-1] for action in group._group_actions)
            for i, line in enumerate(textwrap.wrap(flags, 77 - width, break_on_hyphens=False)):
                lines.append(f"  {'' if i else name:{width}}{line}")
        return "\n".join([*lines, "", f"for example:\n  {self.epilog}"]) + "\n"

    def format_topic(self, topic: str) -> str:
        """The flags of one topic, or of 'all', in full. Raises UsageError for an unknown topic."""
        topics = self._topics()
        if topic == "all":
            return self.format_help()
        if topic not in topics:
            raise UsageError(f"--help {topic!r}: choose a topic from {', '.join(topics)}, or all.")
        formatter = self._get_formatter()
        formatter.start_section(topics[topic].title)
        formatter.add_arguments(topics[topic]._group_actions)
        formatter.end_section()
        return formatter.format_help()

    def _topics(self) -> dict[str, Any]:
        """The groups of flags, by the first word of their titles."""
        own = self._action_groups[2:]  # after argparse's two
        return {str(group.title).split()[0]: group for group in own if group._group_actions}


def settings_flags(parser: argparse.ArgumentParser, kind: type[Settings]) -> dict[str, Any]:
    """Add the flags of a script's settings, with the published project's names, and the flags that are not
    settings; returns the groups of flags by title."""
    groups = add_flags(parser, kind)
    add_flags(parser, SlurmOptions)
    add = groups[RUN].add_argument
    add(
        "--timestamps",
        action="store_true",
        help="no effect; accepted because the published project has it",
    )
    add("--resume", metavar="DIR", help="resume the interrupted run in DIR, with its settings")
    return groups


def parse_settings(kind: type[AnySettings], namespace: argparse.Namespace) -> AnySettings:
    """Turn parsed flags into checked settings. Raises UsageError."""
    if namespace.mode is not None and namespace.method is not None:
        raise UsageError("--method and --mode both name the method: give one of them.")
    settings = check_settings(from_flags(kind, namespace))
    given = [name for name, value in vars(namespace).items() if value is not None]
    for name, why in without_effect(settings, given).items():
        raise UsageError(f"{_given(namespace, name)} has no effect {why}.")
    return settings


def _given(namespace: argparse.Namespace, name: str) -> str:
    """A flag that is given."""
    return f"--no_{name}" if getattr(namespace, name) is False else flag(name)


def resumed_settings(kind: type[AnySettings], saved: Any, namespace: argparse.Namespace) -> AnySettings:
    """The settings of the run to resume. Raises UsageError if other settings are given."""
    refuse_others(namespace, "--resume", RESUMING)
    return settings_from_json(kind, saved)


def refuse_others(namespace: argparse.Namespace, folder: str, allowed: Collection[str]) -> None:
    """Raise UsageError if flags are given that are not among the `allowed`. folder: the flag that names a
    folder, which gives all settings."""
    for name, value in vars(namespace).items():
        if value is not None and name not in allowed:
            raise UsageError(
                f"{folder} takes all settings from its folder: leave out {_given(namespace, name)}, or start "
                "a new run."
            )


def settings_from_json(kind: type[AnySettings], saved: Any) -> AnySettings:
    """Settings from run.json. Raises UsageError if they are from another program or version."""
    try:
        settings = from_json(kind, saved)
    except ValueError as error:
        raise UsageError(f"--resume: run.json there does not fit this script ({error}).") from None
    return check_settings(settings)


def command(script: str) -> str:
    """The command for a root script: its console script (eval/commands.py) if that is running."""
    installed = COMMANDS[script]
    return installed if Path(sys.argv[0]).stem == installed else f"python {script}"
