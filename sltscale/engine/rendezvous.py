"""Where the ranks meet before the process group is formed, so that one that does not come is named, with its node."""

from __future__ import annotations

import datetime
import os
import socket
import time

import torch.distributed as dist

from sltscale.errors import InputError
from sltscale.launching import Place

LIMIT_SECONDS = 600.0  # for all ranks to come: containers are pulled and libraries read on every node before
LOOK_SECONDS, ATTEMPT_SECONDS = 0.2, 3.0
# The listener, a store that has gone again meanwhile (see below), the word of rank 0; and something for the rest.
WITHIN = 4
COMPLETE = "sltscale/complete"


def meet(place: Place, seconds: float) -> dist.Store | None:
    """Wait until every rank has come to rank 0; the store, to be kept until the process group is formed.

    InputError, with the ranks and nodes nothing was heard from, if rank 0 has waited longer than ``seconds``, or with
    this rank's node if it has not reached rank 0 by then; on every rank within ``WITHIN`` times ``seconds``.
    """
    if place.world_size == 1:
        return None
    where = f"{place.address}:{place.port}"
    node = os.environ["SLURMD_NODENAME"] if place.launcher == "srun" else socket.gethostname()
    limit = datetime.timedelta(seconds=seconds)
    # torchrun's agent listens there itself
    listens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not listens:
            _wait_for_listener(place, seconds)
        store = dist.TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=listens,
            timeout=limit / 2,  # it may try to connect more than once
            wait_for_workers=False,
            multi_tenant=True,  # the process group will listen there too
        )
        store.set_timeout(limit)
        store.set(_key(place.rank), node)
        if place.rank == 0:
            store.set(COMPLETE, _absent(store, place, seconds))
        store.wait([COMPLETE], 1.5 * limit)  # rank 0 speaks first, which knows who is missing
        complaint = store.get(COMPLETE).decode()
    except (dist.DistError, OSError) as error:
        raise InputError(_no_meeting(place, node, where, error)) from None
    if complaint:
        raise InputError(f"no process group at {where}: {complaint}")
    return store


def _wait_for_listener(place: Place, seconds: float) -> None:
    """OSError, the last attempt's, if nobody listens within that time.

    A TCPStore would wait by itself, but up to two and a half times its limit, as its random pauses fall (torch 2.13).
    """
    deadline = time.monotonic() + seconds
    while True:
        try:  # the name may have several addresses that do not answer, and the limit is for each
            socket.create_connection((place.address, place.port), ATTEMPT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() + LOOK_SECONDS > deadline:
                raise
        time.sleep(LOOK_SECONDS)


def _key(rank: int) -> str:
    return f"sltscale/rank/{rank}"


def _absent(store: dist.Store, place: Place, seconds: float) -> str:
    """Empty when all have come, else who has not."""
    try:
        store.wait([_key(rank) for rank in range(place.world_size)], datetime.timedelta(seconds=seconds))
        return ""
    except dist.DistStoreError:
        there = {rank: store.get(_key(rank)).decode() for rank in range(place.world_size) if store.check([_key(rank)])}
    absent = [rank for rank in range(place.world_size) if rank not in there]
    silent = [node for node in place.nodes if node not in there.values()]
    nodes = f"nothing was heard from node {', '.join(silent)}; " if silent else ""
    return (
        f"after {seconds:.3g} s rank {', '.join(map(str, absent))} of {place.world_size} has not come; {nodes}"
        f"the others are on {', '.join(sorted(set(there.values())))}; look into that node's log, or leave it out"
    )


def _no_meeting(place: Place, node: str, where: str, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if place.rank == 0:
        return (
            f"no process group at {where}: rank 0 on node {node} cannot listen there: {reason}; if another job uses "
            "the port, give deepspeed --master_port N (srun: a new job has another)"
        )
    first = f" on node {place.nodes[0]}" if place.nodes else ""
    return (
        f"no process group at {where}: rank {place.rank} on node {node} does not reach rank 0{first}: {reason}; "
        "is that node up, and MASTER_ADDR of the site file an address of it?"
    )
