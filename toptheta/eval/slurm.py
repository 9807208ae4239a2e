"""Runs on a Slurm cluster, submitted with submitit; SUBMITIT_CLUSTER=local uses this machine instead."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.options import at_least, option

CLUSTER = "cluster"  # group of flags


@dataclass(frozen=True)
class SlurmOptions:
    """Where to run, if not on this machine. processes: per node."""

    slurm: str | None = option(
        None, "submit the run to this partition of a Slurm cluster", metavar="PARTITION", group=CLUSTER
    )
    slurm_hours: int = option(
        24, "time limit of the Slurm job (default 24)", metavar="H", group=CLUSTER, rule=at_least(1)
    )
    nodes: int = option(
        1, "--slurm: nodes that share the run (default 1)", metavar="N", group=CLUSTER, rule=at_least(1)
    )
    processes: int = option(
        1,
        "--slurm: processes on each node, with a GPU each unless --device is cpu (default 1)",
        metavar="N",
        group=CLUSTER,
        rule=at_least(1),
    )


def executor(partition: str, hours: int, logs: Path, **resources: Any) -> Any:
    """The submitit executor of a cluster. resources: for its `update_parameters`. Raises UsageError if there
    is no Slurm."""
    import submitit

    wanted = os.environ.get("SUBMITIT_CLUSTER")
    try:
        found = submitit.AutoExecutor(folder=logs / "slurm-%j", cluster=wanted)
    except RuntimeError as error:
        raise UsageError(f"--slurm {partition}: {error}") from None
    if wanted is None and found.cluster != "slurm":  # it takes this machine then
        raise UsageError(f"--slurm {partition}: this machine has no Slurm (no srun); run it here instead.")
    found.update_parameters(timeout_min=60 * hours, slurm_partition=partition, **resources)
    return found


def submit_run(options: SlurmOptions, arguments: list[str], output_dir: str, gpus: bool) -> None:
    """Submit this script with these arguments as one job, whose processes share the run, and return at once.
    gpus: whether each process gets a GPU."""
    assert options.slurm is not None
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *arguments]
    logs = Path(output_dir) / "slurm"
    job = executor(
        options.slurm,
        options.slurm_hours,
        logs,
        nodes=options.nodes,
        tasks_per_node=options.processes,
        gpus_per_node=options.processes if gpus else 0,
    ).submit(_process(command))
    print(job.job_id, shlex.join(["python", *command[1:]]))
    say(f"Submitted {options.nodes * options.processes} processes; their output goes to {logs}/slurm-*")


def _process(command: list[str]) -> Callable[[], None]:
    """One process of a job: exports its rank and runs the command. The nested function is pickled by value,
    so that this package need not be importable where it runs."""

    def run() -> None:
        import subprocess

        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        subprocess.run(command, check=True)

    return run
