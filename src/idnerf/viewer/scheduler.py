"""Two threads that render what the queue says: one for moving cameras, one for everything that takes its time.

Both use the one model. They do not compete for the processor: long work pauses, between two layers of the network,
while a coarse picture is due.
"""

import threading
import time
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from idnerf.errors import InputError
from idnerf.viewer.render_queue import Cancelled, Job, Level, RenderQueue

LONGEST_PAUSE, LEAST_RUN = 0.5, 0.2
"""Seconds: long work steps aside for this long at a time, and then gets this long, so that a browser that never rests
slows the others down and does not stop them."""

Checkpoint = Callable[[], None]


class RenderScheduler:
    """Runs jobs until ``close``.

    Args:
        render: (request, level, checkpoint) -> picture. Calls ``checkpoint()`` often; it raises ``Cancelled`` when
            the picture is not wanted any more, and may pause.
        deliver: (client, picture) for coarse and full pictures; called from a worker thread.
        failed: (client, message) when rendering a request was not possible.
        queue: the bookkeeping; a new one by default.
    """

    def __init__(
        self,
        render: Callable[[Any, Level, Checkpoint], Any],
        deliver: Callable[[Hashable, Any], None],
        failed: Callable[[Hashable, str], None],
        queue: RenderQueue | None = None,
    ):
        self.queue = queue or RenderQueue()
        self._render, self._deliver, self._failed = render, deliver, failed
        self._workers = [
            threading.Thread(target=self._work, args=(take,), daemon=True, name=name)
            for take, name in [(self.queue.take_interactive, "coarse"), (self.queue.take_patient, "full")]
        ]
        for worker in self._workers:
            worker.start()

    def add(self, client: Hashable) -> None:
        """A browser has come."""
        self.queue.add(client)

    def show(self, client: Hashable, request: Any) -> None:
        """Show this to a browser from now on."""
        self.queue.show(client, request)

    def submit(self, client: Hashable, request: Any) -> Future[Any]:
        """Render this to be saved."""
        return self.queue.submit(client, request)

    def remove(self, client: Hashable) -> None:
        """A browser has gone: its work stops."""
        self.queue.remove(client)

    def close(self) -> None:
        """Stop both threads; waits for them, a few seconds at most."""
        self.queue.close()
        for worker in self._workers:
            worker.join(timeout=10)

    def _work(self, take: Callable[[], Job | None]) -> None:
        queue = self.queue
        while True:
            with queue.changed:
                while not queue.closed and (job := take()) is None:
                    queue.changed.wait(queue.seconds_to_wait() if take == queue.take_patient else None)
                if queue.closed:
                    return
            self._run(job)

    def _run(self, job: Job) -> None:
        try:
            picture = self._render(job.request, job.level, self._checkpoint_of(job))
        except Cancelled:
            self.queue.finish(job, done=False)
            return
        except Exception as error:  # one request that fails must not end the service for everybody
            if not isinstance(error, InputError):
                traceback.print_exception(error)
            if job.future is not None:
                _settle(job.future, error=error)
            if self.queue.finish(job, done=True):
                self._failed(job.client, str(error))
            return
        if job.future is not None:
            self.queue.finish(job, done=True)
            _settle(job.future, picture)
        elif self.queue.finish(job, done=True):
            self._deliver(job.client, picture)

    def _checkpoint_of(self, job: Job) -> Checkpoint:
        queue = self.queue
        ran_since = -LEAST_RUN

        def checkpoint() -> None:
            nonlocal ran_since
            if job.cancelled.is_set():
                raise Cancelled
            if job.level is Level.COARSE or time.monotonic() - ran_since < LEAST_RUN:
                return
            if queue.interactive_work():
                with queue.changed:
                    queue.changed.wait_for(
                        lambda: job.cancelled.is_set() or not queue.interactive_work(), LONGEST_PAUSE
                    )
                ran_since = time.monotonic()
                if job.cancelled.is_set():
                    raise Cancelled

        return checkpoint


def _settle(future: Future[Any], result: Any = None, error: Exception | None = None) -> None:
    """Give a future its outcome, unless it was cancelled meanwhile."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        return
