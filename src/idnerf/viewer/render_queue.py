"""Who is rendered next: several browsers, one model. Bookkeeping only; threads and the model are elsewhere.

Per client the latest request wins. It is rendered coarse at once, and full once the client has rested; work that a
newer request has made stale is told to stop, and so is everything of a client that has gone. Pictures and video
frames to save wait in line behind what people look at.

    interactive worker:  coarse pictures, the client served longest ago first
    patient worker:      full pictures of clients at rest, then frames to save
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Level(Enum):
    """What a job is for."""

    COARSE = "coarse"
    FULL = "full"
    SAVE = "save"


class Cancelled(Exception):
    """Raised inside a job whose result nobody wants any more."""


@dataclass(eq=False)
class Job:
    """One picture to render.

    Attributes:
        client: whose.
        request: what, as ``show`` or ``submit`` was given it.
        level: coarse, full or to be saved.
        version: the client's request counter when the job was made.
        future: where the result of a ``SAVE`` job goes.
        cancelled: set when the result is not wanted any more.
    """

    client: Hashable
    request: Any
    level: Level
    version: int
    future: Future[Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class ClientState:
    """What is known of one client."""

    request: Any = None
    version: int = 0
    changed_at: float = 0.0
    coarse_done: int = 0
    full_done: int = 0
    served_at: dict[Level, int] = field(default_factory=dict)
    to_save: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)

    def runs(self, level: Level) -> bool:
        return any(job.level is level for job in self.running)

    @property
    def awaits_full(self) -> bool:
        """The coarse picture comes first: it must not arrive after the full one."""
        return self.full_done < self.version == self.coarse_done and not self.runs(Level.FULL)


class RenderQueue:
    """The order of jobs. Every method may be called from any thread.

    Args:
        rest_seconds: how long a request stays unchanged before it is rendered full.
        clock: seconds, monotonic.
    """

    def __init__(self, rest_seconds: float = 0.35, clock: Callable[[], float] = time.monotonic):
        self.rest_seconds = rest_seconds
        self.changed = threading.Condition(threading.RLock())
        self._clock = clock
        self._clients: dict[Hashable, ClientState] = {}
        self._turn = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def add(self, client: Hashable) -> None:
        """Know a client from now on; what unknown (gone) clients ask for is dropped."""
        with self.changed:
            self._clients.setdefault(client, ClientState())

    def show(self, client: Hashable, request: Any) -> None:
        """Render this for the client, instead of whatever it asked to be shown before."""
        with self.changed:
            state = self._clients.get(client)
            if state is None:
                return
            state.request, state.version, state.changed_at = request, state.version + 1, self._clock()
            for job in state.running:
                if job.level is Level.FULL:
                    job.cancelled.set()
            self.changed.notify_all()

    def submit(self, client: Hashable, request: Any) -> Future[Any]:
        """Render this when there is time; the future is cancelled if the client goes."""
        future: Future[Any] = Future()
        with self.changed:
            state = self._clients.get(client)
            if state is None or self._closed:
                future.cancel()
            else:
                state.to_save.append(Job(client, request, Level.SAVE, state.version, future))
                self.changed.notify_all()
        return future

    def remove(self, client: Hashable) -> None:
        """Forget a client: its waiting work is dropped, its running work told to stop."""
        with self.changed:
            state = self._clients.pop(client, None)
            if state is not None:
                for job in [*state.running, *state.to_save]:
                    _cancel(job)
            self.changed.notify_all()

    def close(self) -> None:
        """Stop: forget all clients; ``take`` gives nothing any more."""
        with self.changed:
            self._closed = True
            for client in list(self._clients):
                self.remove(client)
            self.changed.notify_all()

    def take_interactive(self) -> Job | None:
        """The next coarse picture, or None."""
        with self.changed:
            waiting = [
                (state.served_at.get(Level.COARSE, 0), client)
                for client, state in self._clients.items()
                if state.coarse_done < state.version and not state.runs(Level.COARSE)
            ]
            return self._start(min(waiting, key=lambda w: w[0])[1], Level.COARSE) if waiting else None

    def take_patient(self) -> Job | None:
        """The next full picture of a client at rest, else the next frame to save, else None."""
        with self.changed:
            now = self._clock()
            rested = [
                (state.served_at.get(Level.FULL, 0), client)
                for client, state in self._clients.items()
                if state.awaits_full and now - state.changed_at >= self.rest_seconds
            ]
            if rested:
                return self._start(min(rested, key=lambda w: w[0])[1], Level.FULL)
            saving = [(s.served_at.get(Level.SAVE, 0), client) for client, s in self._clients.items() if s.to_save]
            return self._start(min(saving, key=lambda w: w[0])[1], Level.SAVE) if saving else None

    def seconds_to_wait(self) -> float | None:
        """Seconds until the next client has rested; None when only a new request brings work."""
        with self.changed:
            now = self._clock()
            waits = [
                max(0.0, state.changed_at + self.rest_seconds - now)
                for state in self._clients.values()
                if state.awaits_full
            ]
            return min(waits, default=None)

    def interactive_work(self) -> bool:
        """Whether a coarse picture is waiting or being rendered: patient work then steps aside."""
        with self.changed:
            return any(s.coarse_done < s.version or s.runs(Level.COARSE) for s in self._clients.values())

    def finish(self, job: Job, *, done: bool) -> bool:
        """Report a job as done (or stopped); returns whether its result is still wanted.

        A coarse picture is wanted although the camera has moved on: it is the best there is.
        """
        with self.changed:
            state = self._clients.get(job.client)
            wanted = done and state is not None and not job.cancelled.is_set()
            if state is not None:
                state.running.remove(job)
                if done and job.level is Level.COARSE:
                    state.coarse_done = job.version
                elif wanted and job.level is Level.FULL:
                    state.full_done = job.version
            self.changed.notify_all()
            return wanted

    def _start(self, client: Hashable, level: Level) -> Job:
        state = self._clients[client]
        self._turn += 1
        state.served_at[level] = self._turn
        job = state.to_save.popleft() if level is Level.SAVE else Job(client, state.request, level, state.version)
        state.running.append(job)
        return job


def _cancel(job: Job) -> None:
    job.cancelled.set()
    if job.future is not None:
        job.future.cancel()
