"""The table of methods in docs/methods.md: `python -m toptheta.report.methods`."""

import sys
from dataclasses import fields

from toptheta.methods.base import Method, names, registered
from toptheta.report.tables import Column, build


def methods_table() -> str:
    """A row for each registered method, from its declarations."""
    methods = [registered()[name]() for name in names()]
    return build(
        methods,
        [
            Column("method", lambda method: f"`{method.name}`"),
            Column("keeps", _rule),
            Column("options", _options),
            Column("prompts", lambda method: "dense" if method.decode_only or method.is_dense else "sparse"),
            Column(
                "K rows that a decode step reads", lambda method: "all" if method.reads_all_keys else "kept"
            ),
            Column("stores in addition to the cache, bytes for each token and KV head", lambda m: m.stores),
            Column("source", lambda method: method.source or "-"),
        ],
    )


def _rule(method: Method) -> str:
    """The first sentence of the method's file, without its name and anything from a bracket on."""
    words = " ".join((sys.modules[type(method).__module__].__doc__ or "").split("\n\n")[0].split())
    return words.partition(": ")[2].partition(" (")[0].partition(". ")[0].rstrip(".")


def _options(method: Method) -> str:
    return ", ".join(f"`{f.name}={f.default}`" for f in fields(method)) or "-"


if __name__ == "__main__":
    print(methods_table())
