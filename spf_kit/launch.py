"""Several processes of one command, as `accelerate launch`, `torchrun` and `mpirun` start them.

What they compute together is accelerate's business (`training.session`). This is about what a person sees:
one process speaks, and of several that end with an error, one tells it. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from datetime import timedelta

from spf_kit.errors import UserError

# each launcher's own variables, in the order in which accelerate looks at them
INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PATIENCE = timedelta(seconds=5)  # for the launcher's store to answer
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP",
           "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # fmt: skip


def index() -> int:
    """Which process this is, from 0."""
    return _number(INDEX, 0)


def count() -> int:
    """How many there are."""
    return _number(COUNT, 1)


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return index() == 0


def check(gpus: int) -> None:
    """Raises UserError for a launch that cannot train; `gpus`: of this machine, 0 for the CPU."""
    for variable, name in SHARDED.items():
        if _on(variable):
            raise UserError(
                f"{name} splits a model over devices, and spf-kit trains an adapter on a whole model in each "
                f"process: start accelerate launch without {name}"
            )

    here = _number(("LOCAL_WORLD_SIZE",), 1)
    if gpus and here > gpus and not _on("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{here} processes were started on a machine with {gpus} {'GPU' if gpus == 1 else 'GPUs'}: start "
            f"one for each, with accelerate launch --num_processes {gpus}"
        )


def advice() -> list[str]:
    """What hardly is what was meant, one sentence each."""
    # set by accelerate where it was asked for several processes, and then starts one all the same
    if count() == 1 and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        return [
            "accelerate launch was asked for several processes and has started one, as it does on a machine "
            "without several GPUs: add --multi_gpu, which works on CPUs too"
        ]
    return []


def command() -> list[str]:
    """How a command line begins that does this again; of several machines each has a launcher of its own."""
    if count() == 1:
        return ["spf-kit"]
    several = _number(("LOCAL_WORLD_SIZE",), count()) < count()
    options = ["..."] if several else ["--multi_gpu", "--num_processes", str(count())]
    return ["accelerate", "launch", *options, "-m", "spf_kit"]


def ends_first(code: int) -> int | None:
    """Asked by a process that is about to end with an error. None: the first one, which tells it.

    Otherwise another process has told the error and this one ends because of it: the exit code that is due.
    The launcher's store decides; where there is none (yet, or any more) the main process tells.
    """
    if count() == 1:
        return None
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # the launcher's to all others, once the first has ended
    mine = f"{index()} {code}"
    try:
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=PATIENCE.total_seconds()).close()  # torch would log
        store = TCPStore(address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        key = f"spf_kit/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        first = store.compare_set(key, "", mine).decode()
    except (KeyError, ValueError, OSError, RuntimeError, ImportError):  # torch's DistError is a RuntimeError
        return None if is_main() else code
    return None if first == mine else int(first.split()[1])


def lost_another(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    torch = sys.modules.get("torch")
    if count() == 1 or torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _number(variables: tuple[str, ...], default: int) -> int:
    """The first that is set to a number of 0 or more."""
    for variable in variables:
        value = os.environ.get(variable, "")
        if value.isdecimal():
            return int(value)
    return default
