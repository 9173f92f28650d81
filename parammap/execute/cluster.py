"""`--ray ADDRESS`: the tasks of a conversion on the nodes of a Ray cluster, over a folder that all
of them share.

The nodes import the very package that runs here: it travels with the job. A task whose node dies
begins anew on another; every attempt writes a temporary file of its own, so a worker that is only
believed dead spoils nothing."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from parammap.errors import RefusedError, TaskError
from parammap.execute.local import check_time, run_batch
from parammap.execute.progress import Progress
from parammap.execute.writer import Outcome
from parammap.plan.plan import FileTask

CONNECT_SECONDS = 10.0
#: Ray's client server gives up after 30 s on a session that starts slowly, on a busy head or an
#: environment on a network file system
CONNECT_TRIES = 3
#: how long a cluster may be without any CPU (a head alone, before its workers join or after they
#: died)
NODES_SECONDS = 60.0
STOP_SECONDS = 30.0
#: tasks sent per CPU of the cluster: one that runs and one that waits for it, so that a plan is
#: never sent whole
TASKS_PER_CPU = 2
MAX_RETRIES = 3

#: size in bytes and time of the last change in whole seconds: what tells one file from another
#: under the same path
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a task works: `home` is what relative paths of the source start from, `scratch` takes
    temporary files."""

    home: str
    staging: str
    scratch: str


def run_tasks_on_ray(
    address: str,
    tasks: list[FileTask],
    staging: Path,
    progress: Progress,
    timeout: float | None = None,
) -> Iterator[Outcome]:
    """Run the tasks on the cluster at `address` (auto, host:port or ray://host:port); yields
    outcomes as they come.

    Connects at once and raises RefusedError if that fails. The iterator raises TaskError when a
    task fails, when it is lost MAX_RETRIES + 1 times with the worker that ran it, when no node is
    left or `timeout` seconds are over; tasks under way are then stopped, as they are when the
    iterator is closed."""
    deadline = time.monotonic() + timeout if timeout else float("inf")
    ray = _connect(address)
    return _run(_Job(ray, address, tasks, staging), staging, progress, deadline)


def _run(job: _Job, staging: Path, progress: Progress, deadline: float) -> Iterator[Outcome]:
    try:
        while job.waiting or job.sent:
            check_time(deadline, staging)
            for task, outcome in job.step():
                progress.add(task.streamed)
                yield outcome
            progress.show()
    finally:
        job.stop()


def _connect(address: str) -> ModuleType:
    try:
        import ray
    except ImportError:
        raise RefusedError(
            "--ray: Ray is not installed here; pip install 'parammap[ray]', or leave the flag out"
        ) from None
    _check_answers(address)
    package = {"py_modules": [str(Path(__file__).parents[1])], "excludes": ["__pycache__"]}
    for left in reversed(range(CONNECT_TRIES)):
        try:
            ray.init(
                address, runtime_env=package, log_to_driver=False, logging_level=logging.CRITICAL
            )
            break
        except Exception as error:  # of many types, by way of connecting
            if not (left and isinstance(error, ConnectionError)):
                raise _unreachable(address, str(error)) from error
    return ray


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes to reach a machine that is not there."""
    where = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if where == "auto":
        return
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise RefusedError(
            f"--ray {where}: is no address of a Ray cluster; give auto, HOST:PORT or "
            f"ray://HOST:PORT"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(where, getattr(error, "strerror", None) or str(error)) from error


def _unreachable(address: str, reason: str) -> RefusedError:
    first = reason.strip().split("\n")[0].rstrip(".")
    return RefusedError(
        f"--ray {address}: no Ray cluster can be reached there ({first}); start one with ray "
        "start, or leave the flag out"
    )


class _Job:
    """The tasks that wait here, and those that were sent, each with the reference that Ray gave for
    it."""

    def __init__(self, ray: ModuleType, address: str, tasks: list[FileTask], staging: Path) -> None:
        self.ray, self.address, self.staging = ray, address, staging.absolute()
        self.waiting = deque(tasks)
        self.sent: dict[object, FileTask] = {}
        self.stamps = {file: _stamp(file) for task in tasks for file in task.files()}
        self.scratch = _new_scratch(self.staging.parent)
        home = "/" if all(map(os.path.isabs, self.stamps)) else os.getcwd()
        self.folders = Folders(home, str(self.staging), str(self.scratch))
        self.remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(
            run_on_node
        )
        self.seen_nodes = time.monotonic()

    def step(self) -> list[tuple[FileTask, Outcome]]:
        """Send as many tasks as the cluster has use for, and wait a moment; returns what was
        finished meanwhile."""
        cpus = self._cpus()
        while self.waiting and len(self.sent) < TASKS_PER_CPU * cpus:
            self._send(self.waiting.popleft())
        if not self.sent:
            time.sleep(0.5)
            return []
        ready, _ = self.ray.wait(list(self.sent), timeout=0.5)
        return [
            (task := self.sent.pop(reference), self._outcome(task, reference))
            for reference in ready
        ]

    def stop(self) -> None:
        """Leave nothing behind: no task, no temporary file, no connection."""
        for reference in self.sent:
            self.ray.cancel(reference, force=True)
        if self.sent:
            self.ray.wait(list(self.sent), num_returns=len(self.sent), timeout=STOP_SECONDS)
        self.ray.shutdown()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _cpus(self) -> int:
        cpus, now = int(self.ray.cluster_resources().get("CPU", 0)), time.monotonic()
        if cpus:
            self.seen_nodes = now
        elif now - self.seen_nodes > NODES_SECONDS:
            raise TaskError(
                f"{self.staging}: no node of the Ray cluster at {self.address} has had a CPU for "
                f"{NODES_SECONDS:.0f} s; add nodes, and the run goes on from here"
            )
        return cpus

    def _send(self, task: FileTask) -> None:
        stamps = {file: self.stamps[file] for file in task.files()}
        self.sent[self.remote.remote(task, self.folders, stamps)] = task

    def _outcome(self, task: FileTask, reference: object) -> Outcome:
        try:
            outcome: Outcome | TaskError = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as error:
            first = str(error).strip().split("\n")[0]
            raise TaskError(
                f"{self.staging / task.path}: was lost with the worker that wrote it, "
                f"{MAX_RETRIES + 1} times ({first})"
            ) from error
        if isinstance(outcome, TaskError):
            raise outcome
        return outcome


def run_on_node(task: FileTask, folders: Folders, stamps: dict[str, Stamp]) -> Outcome | TaskError:
    """What a node runs. A TaskError is returned, since Ray reports one that is raised in many
    lines."""
    try:
        _check_shared(folders, stamps)
        (outcome,) = run_batch(
            [task], Path(folders.staging), lambda nbytes: None, Path(folders.scratch)
        )
        return outcome
    except TaskError as error:
        return error


def _check_shared(folders: Folders, stamps: dict[str, Stamp]) -> None:
    """What this node sees must be what the machine sees that made the plan. Goes to the home folder
    on the way."""
    node = socket.gethostname()
    for folder in (folders.home, folders.scratch):
        if not os.path.isdir(folder):
            raise TaskError(
                f"{folder}: node {node} does not see this folder; all nodes must share it, under "
                f"the same path"
            )
    os.chdir(folders.home)
    for file, stamp in stamps.items():
        try:
            same = _stamp(file) == stamp
        except TaskError as error:
            raise TaskError(
                f"{error}, on node {node}; all nodes must see the source under the same path"
            ) from error
        if not same:
            raise TaskError(
                f"{file}: is another file on node {node} than where the run was started; all nodes "
                "must see the same source under this path"
            )


def _stamp(file: str) -> Stamp:
    try:
        found = os.stat(file)
    except OSError as error:
        raise TaskError(f"{file}: {error.strerror}") from error
    return found.st_size, int(found.st_mtime)


def _new_scratch(folder: Path) -> Path:
    """A folder for temporary files whose name no run before had; those of killed runs go, and with
    them whoever writes."""
    for old in folder.glob("ray-*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="ray-", dir=folder))
