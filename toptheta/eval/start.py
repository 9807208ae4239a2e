"""Starts a run of one of the two scripts, on this machine or on a cluster."""

import argparse

from toptheta.eval.cli import parse_settings, resumed_settings
from toptheta.eval.rules import flag
from toptheta.eval.settings import Settings
from toptheta.eval.slurm import SlurmOptions, submit_run
from toptheta.util.errors import UsageError
from toptheta.util.options import check_options, from_flags, to_flags


def start(kind: type[Settings], script: str, arguments: argparse.Namespace) -> None:
    """Start the run given by a script's flags, or resume one. Raises UsageError."""
    if arguments.resume is not None:
        from toptheta.eval.run import check_resume

        settings = resumed_settings(kind, check_resume(arguments.resume, script), arguments)
    else:
        settings = parse_settings(kind, arguments)
    cluster = from_flags(SlurmOptions, arguments)
    check_options(cluster, flag)
    if cluster.slurm is not None:
        flags = ["--resume", arguments.resume] if arguments.resume else to_flags(settings)
        submit_run(cluster, flags, settings.output_dir, settings.device != "cpu")
        return
    if cluster != SlurmOptions():
        raise UsageError(
            f"{to_flags(cluster)[0]} applies to --slurm only: on this machine, start processes with torchrun "
            "or accelerate."
        )
    from toptheta.eval.runner import evaluate

    evaluate(settings, arguments.resume)
