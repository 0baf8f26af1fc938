"""The connections between workers: who is there, and who is lost.

Everything that happens, here or elsewhere, is an event: a worker's index and a message. Messages
between workers are JSON objects, one a line:

    {"worker": 3, "workers": 16}                        to worker 0: here I am
    {"refused": why} {"missing": names} {"start": true} from worker 0, in answer
    {"alive": true}                                     both ways, every few seconds
    {"ended": 0}                                        to worker 0; -9: by signal 9; and from it,
                                                        where it was stopped before the start
    {"verdict": {"code": 0, "failed": 1, "why": why}}   from worker 0
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from typing import Any

from fot_jax.common.errors import UserError
from fot_jax.training.cluster import Place

LONGEST_LINE = 4096  # bytes
TRY_SECONDS, PAUSE_SECONDS = 10, 0.5  # to connect, and before the next try
FAREWELL_SECONDS = 5  # for others to hear what was sent last, and hang up

Events = asyncio.Queue[tuple[int, dict[str, Any]]]
Links = dict[int, asyncio.StreamWriter]


def name_of(place: Place, worker: int) -> str:
    """A worker as messages to people name it."""
    return f"worker {worker} ({place.hosts[worker]})"


# --- The count -----------------------------------------------------------------------------------


async def count(
    place: Place,
    links: Links,
    events: Events,
    timeout: float,
    silence: float,
) -> asyncio.Server:
    """Worker 0 listens until all others are here, and tells them to start.

    Returns what listens on, until the run closes it: workers of another run must not be counted
    here meanwhile, whose commands would take themselves for parts of this one.

    Raises:
      UserError: some are missing when the time is over, or the port is taken.
    """
    workers = len(place.hosts)
    over = False

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await _receive(reader, silence)
        worker = hello.get("worker")
        if type(worker) is not int or type(hello.get("workers")) is not int:
            writer.close()  # not one of ours
            return
        refused = None
        if over:
            refused = "another run is going on here"
        elif not 0 < worker < workers or hello["workers"] != workers:
            refused = f"it counts {hello['workers']} workers, worker 0 {workers}"
        elif worker in links:
            refused = "another one with its number was here before"
        if refused:
            send([writer], {"refused": refused})
            writer.close()
            return
        links[worker] = writer
        events.put_nowait((worker, hello))
        await _listen(worker, reader, events, silence)

    host = place.hosts[0]
    local = host == "localhost" or host.startswith("127.")
    try:
        server = await asyncio.start_server(
            welcome, host if local else None, place.port, limit=LONGEST_LINE
        )
    except OSError as error:
        raise UserError(
            f"worker 0 cannot listen on port {place.port} ({error.strerror}): is another run still "
            "going on here?"
        ) from error
    try:
        async with asyncio.timeout(timeout):
            while len(links) < workers - 1:
                worker, message = await events.get()
                if "lost" in message:  # it may come again
                    links.pop(worker).close()
        send(links.values(), {"start": True})
        return server
    except asyncio.CancelledError:
        server.close()
        raise
    except TimeoutError:
        server.close()
        missing = [name_of(place, i) for i in range(1, workers) if i not in links]
        names = f"{', '.join(missing)} of {workers} workers"
        send(links.values(), {"missing": names})
        raise _missing(names, timeout) from None
    finally:
        over = True


async def report(
    place: Place,
    links: Links,
    events: Events,
    timeout: float,
    silence: float,
) -> bool:
    """Another worker connects to worker 0 and waits until it may start; False: it was stopped.

    Raises:
      UserError: worker 0 cannot be reached, goes away, refuses, or misses others.
    """
    reader, links[0] = await _connect(place, timeout)
    send(links.values(), {"worker": place.index, "workers": len(place.hosts)})
    asyncio.ensure_future(_listen(0, reader, events, silence))
    _, message = await events.get()
    if "missing" in message:
        raise _missing(str(message["missing"]), timeout)
    if "start" not in message and "ended" not in message:
        what = message.get("refused", message.get("lost"))
        raise UserError(
            f"worker {place.index} cannot take part: {name_of(place, 0)}: {what}: see what it "
            "says, and start all workers again"
        )
    return "start" in message


async def _connect(
    place: Place, timeout: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = place.hosts[0], place.port
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, clock() + TRY_SECONDS)):
                return await asyncio.open_connection(host, port, limit=LONGEST_LINE)
        except OSError as error:  # TimeoutError is one
            if clock() + PAUSE_SECONDS > deadline:
                raise UserError(
                    f"worker {place.index} cannot reach worker 0 at {host}:{port} within "
                    f"{timeout:g} s ({error or 'no answer'}): is it started there, and is the port "
                    "open between the hosts?"
                ) from None
        await asyncio.sleep(PAUSE_SECONDS)


def _missing(names: str, timeout: float) -> UserError:
    return UserError(
        f"missing after {timeout:g} s: {names}: start python -m tpu worker on all hosts"
    )


# --- Messages ------------------------------------------------------------------------------------


async def _listen(
    worker: int, reader: asyncio.StreamReader, events: Events, silence: float
) -> None:
    """Makes events of what a worker sends; the last one says how it was lost."""
    while True:
        message = await _receive(reader, silence)
        if message != {"alive": True}:
            events.put_nowait((worker, message))
        if "lost" in message:
            return


async def _receive(reader: asyncio.StreamReader, silence: float) -> dict[str, Any]:
    """The next message; {"lost": why} where there is none."""
    try:
        async with asyncio.timeout(silence):
            line = await reader.readline()
    except TimeoutError:
        return {"lost": f"gave no sign of life for {silence:g} s"}
    except (OSError, ValueError):  # the latter: too long a line
        line = b""
    if not line.endswith(b"\n"):
        return {"lost": "vanished: its connection broke"}
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    return message if isinstance(message, dict) else {"lost": "sent what is no message"}


def send(writers: Iterable[asyncio.StreamWriter], message: dict[str, Any]) -> None:
    """Sends a message on connections that are still open."""
    line = f"{json.dumps(message)}\n".encode()
    for writer in writers:
        if not writer.is_closing():
            writer.write(line)


async def keep_alive(links: Links, seconds: float) -> None:
    """Gives a sign of life every so many seconds."""
    while True:
        send(links.values(), {"alive": True})
        await asyncio.sleep(seconds)


async def hang_up(links: Links) -> None:
    """Closes connections when what was sent has arrived.

    Closing while something unread has come in would reset a connection, and what is under way with
    it. So each end says that it has no more to say, and goes on reading until the other has, too.
    """
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            for writer in links.values():
                with contextlib.suppress(OSError):
                    writer.write_eof()
            listening = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*listening, return_exceptions=True)
    for writer in links.values():
        writer.close()
