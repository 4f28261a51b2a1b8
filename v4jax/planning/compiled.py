"""Programs as the TPU compiler leaves them: HLO, memory, and the schedules of what it made code for."""

import contextlib
import dataclasses
import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from sharding import make_mesh
from v4jax.config import V4Config
from v4jax.planning import leftovers, schedules
from v4jax.planning.plan import Job, program
from v4jax.planning.schedules import Schedule
from v4jax.planning.topologies import COMPILER_OPTIONS, topology_devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is read of a compiled program."""

    text: str  # scheduled HLO
    peak: float  # bytes of memory that a device needs
    held: dict[str, float]  # `Program.held`
    schedules: dict[str, Schedule]  # by the name of an instruction of `code`; empty without
    code: str = ""  # HLO of the program with code, which has estimates and differs a little

    @property
    def temp(self) -> float:
        """Bytes of a device beside parameters, optimizer and cache."""
        return self.peak - sum(self.held.values())


def compile_apart(
    cfg: V4Config, topology: str, job: Job, sizes: dict[str, int], *, has_code: bool
) -> Compiled:
    """Compiles a job's step in a process of its own, which ends with it.

    libtpu takes its flags when it is loaded, so only a new process writes schedules; and a
    compilation that is left alone once the schedule is there (`has_code=False`) ends.

    Args:
      sizes: of the mesh axes.
      has_code: compile to the end and read the schedules, which takes several times as long.

    Raises:
      ValueError: the topology is unknown, the mesh does not suit the job, or the compiler refuses.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_compile, args=(theirs, cfg, topology, job, sizes, has_code))
    child.start()
    theirs.close()
    try:
        found, error = ours.recv()
    except EOFError:
        raise ValueError(f"the compiler of {topology} ended without a result.") from None
    finally:
        child.join()
    if found is None:
        raise ValueError(error)
    return found


def _compile(
    pipe: Connection,
    cfg: V4Config,
    topology: str,
    job: Job,
    sizes: dict[str, int],
    has_code: bool,
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    folder = schedules.start_dump() if has_code else ""
    try:
        planned = program(cfg, job, make_mesh(devices=topology_devices(topology), **sizes))
        lowered = planned.lower()
        if has_code:
            compiled = lowered.compile(COMPILER_OPTIONS | _writing_to(folder))
            text, peak = _scheduled(folder), peak_of(compiled)
            found, code = schedules.read_all(folder), compiled.as_text() or ""
        else:
            (text, peak), found, code = schedule(lowered), {}, ""
        pipe.send((Compiled(text, peak, planned.held, found, code), ""))
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        pipe.send((None, str(error)[:2000]))
    finally:
        pipe.close()
        leftovers.remove()
    leftovers.end_process(0)


def peak_of(compiled: jax.stages.Compiled) -> float:
    """Bytes of memory that a device needs."""
    stats: Any = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return kept + stats.temp_size_in_bytes


def schedule(lowered: jax.stages.Lowered) -> tuple[str, float]:
    """Compiles up to the schedule, which takes a fraction of the time: code is what takes long.

    The compiler writes the scheduled HLO and its memory report before it makes code. It goes on in a
    thread that ends with the process, for which there is `leftovers.end_process`.

    Returns:
      the HLO's text, and the bytes of memory that a device needs.
    """
    folder = leftovers.folder("hlo-")
    options = COMPILER_OPTIONS | _writing_to(folder)
    compiling = ThreadPoolExecutor(1).submit(lowered.compile, options)
    text = ""
    reports: list[Path] = []
    while not (reports and is_whole(text)):
        with contextlib.suppress(TimeoutError):
            compiling.result(timeout=1)  # raises what the compiler does
        reports = list(Path(folder).glob("*memory-usage-report.txt"))
        text = _scheduled(folder)
    return text, memory_of_report(reports[0].read_text())


def is_whole(text: str) -> bool:
    """Whether HLO has been written to its end: what is run comes last."""
    return "\nENTRY " in text and text.rstrip().endswith("\n}")


def memory_of_report(report: str) -> float:
    """Bytes of HBM in the compiler's memory report."""
    return float(re.findall(r"Memory Space: default .*\nTotal bytes: (\d+)", report)[0])


def _writing_to(folder: str) -> dict[str, str | bool]:
    """Options of a compilation that writes scheduled HLO and its memory report."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _scheduled(folder: str) -> str:
    """The HLO that was written there; empty if there is none yet."""
    paths = list(Path(folder).glob("*.after_optimizations.txt"))
    return paths[0].read_text() if paths else ""
