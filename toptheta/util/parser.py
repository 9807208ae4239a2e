"""The parser of all commands."""

import argparse
import sys
from collections import Counter
from typing import Any, NoReturn

from toptheta.util.errors import UsageError, refuse_other_encodings

FREE_TEXT = "TEXT"  # metavar of values that may be empty


class StrictParser(argparse.ArgumentParser):
    """A parser that raises errors as UsageError, without a usage dump. It accepts no abbreviated flag, none
    that is given twice, and no empty value, as of an unset variable."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        refuse_other_encodings(words)
        flags = {name: _name(action) for action in self._actions for name in action.option_strings}
        before = words[: words.index("--")] if "--" in words else words
        given = Counter(flags[name] for word in before if (name := word.partition("=")[0]) in flags)
        for flag, times in given.items():
            if times > 1:
                raise UsageError(f"{flag} is given {times} times, of which one would count: give it once.")
        parsed = super().parse_args(words, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            texts = value if isinstance(value, list) else [value]
            if action.metavar != FREE_TEXT and any(isinstance(one, str) and not one.strip() for one in texts):
                remedy = ", or leave it out" if action.option_strings else ""
                raise UsageError(f"{_name(action)} is empty: give a value{remedy}.")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}; {self.prog} --help lists every flag.")


def _name(action: argparse.Action) -> str:
    """How errors name a flag, or an argument without one."""
    long = [name for name in action.option_strings if name.startswith("--")]
    return long[0] if long else str(action.metavar or action.dest)
