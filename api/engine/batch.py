"""The step loop: rows of many users' requests in one forward of the UNet, joining and leaving between its steps.

One thread turns it, in three verbs. `_schedule` picks the tasks of a step and puts the adapters of new ones into slots,
`_run` calls the UNet once for all their rows, `_postprocess` tells those who wait. A task is one request: its pictures
are two rows each, one with the negative prompt and one with the prompt, or one row where guidance is off.

Whose turn it is follows what each user was given: seconds of the device, least first, a forward's shared by its rows.
A user who comes begins at the least of those who are there, so that nobody is made to wait for what others missed.
Those who do not fit into one forward take turns of a second: were it a step, all would be done at the end of all.
"""

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import structlog
import torch
from torch import Tensor

from api.engine.knee import Knee
from api.engine.slots import NO_ADAPTER, SlotsFull
from api.engine.tasks import Stepped, Task, step
from api.engine.threads import settle
from api.engine.weights import is_out_of_memory
from api.errors import BadPicture, ShuttingDown

T = TypeVar("T")

_Work: TypeAlias = tuple[Future[Any], Callable[[], Any]]
log = structlog.get_logger()

TURN_SECONDS = 1.0
MOST_CREDIT = 1.0  # seconds that what runs behind may save up
GRACE_SECONDS = 0.25  # for which who was drawn for counts as there: a picture is still to be decoded, the next follows


class Batch:
    """Draws tasks, many at once, on a thread of its own.

    Args:
        most_rows: of one forward; a task that alone has more is drawn alone.
        free_memory: hands memory that nothing refers to back to the device.
        knee: finds out how many rows pay; None for as many as there are.
        takes_work: whether `run` has things done on the loop's thread, see `threads`.
        share: of the time, that what runs behind has while there are tasks.
    """

    def __init__(
        self,
        most_rows: int,
        free_memory: Callable[[], None] = lambda: None,
        knee: Knee | None = None,
        takes_work: bool = False,
        share: float = 0.0,
    ) -> None:
        self._takes_work = takes_work
        self._share = share
        self._credit = 0.0  # seconds that what runs behind may take while there are tasks
        self._front_until = 0.0  # when the last in front count as gone
        self._work: deque[_Work] = deque()
        self._work_behind: deque[_Work] = deque()
        self._most_rows = most_rows
        self._knee = knee
        self._free_memory = free_memory
        self._most_cost = math.inf  # of one forward, once one was too large for the memory
        self._tasks: list[Task] = []  # in the order of their arrival
        self._last: list[Task] = []  # those of the step before
        self._served: defaultdict[str, float] = defaultdict(float)  # by user: seconds of the device
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._turn, name="batch", daemon=True)
        self._thread.start()

    def draw(self, task: Task) -> Tensor:
        """Returns the latents of the task's pictures once they are drawn. Blocks; for any thread but the batch's own.

        Raises:
            BadPicture: latents are not finite.
            ShuttingDown: the server stops.
            Exception: what `on_call` or the UNet raised.
        """
        return self.join(lambda: task).ended.result()

    def join(self, make: Callable[[], Task]) -> Task:
        """Returns the task that `make` has made, in the step that follows: its `ended` is for its caller to wait for.

        It is made where `run` would have it made.

        Raises:
            ShuttingDown: the server stops.
            Exception: what `make` raises.
        """
        return self.run(lambda: self._add(make()))

    def _add(self, task: Task) -> Task:
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is stopping")
            present = {other.user_id for other in self._tasks}
            if task.user_id not in present:
                least = min((self._served[user] for user in present), default=0.0)
                self._served[task.user_id] = max(self._served[task.user_id], least) if present else 0.0
            self._tasks.append(task)
            self._changed.notify()
        return task

    def run(self, action: Callable[[], T]) -> T:
        """Returns what `action` does, between two steps where the loop takes work. Blocks; not for the loop's thread.

        Raises:
            ShuttingDown: the server stops.
            Exception: what `action` raises.
        """
        return self._wait_for(self._work, action) if self._takes_work else action()

    def run_behind(self, action: Callable[[], T]) -> T:
        """Returns what `action` does, on the loop's thread; while there are tasks it waits for a share of the time.

        Blocks; not for the loop's thread.

        Raises:
            ShuttingDown: the server stops.
            Exception: what `action` raises.
        """
        return self._wait_for(self._work_behind, action)

    def _wait_for(self, queue: "deque[_Work]", action: Callable[[], T]) -> T:
        done = Future[T]()
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is stopping")
            queue.append((done, action))
            self._changed.notify()
        try:
            return done.result()
        finally:
            del done  # an error's traceback has this frame

    def close(self) -> None:
        """Ends the thread after the step under way; what is not drawn by then raises ShuttingDown."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _turn(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._most_cost = math.inf  # whoever comes next may find more memory
                grace = self._front_until - time.perf_counter()
                if not self._changed.wait_for(self._has_turn, grace if grace > 0 else None):
                    continue
                if self._stopping:
                    self._end(self._tasks, ShuttingDown("the server is stopping"))
                    for done, _ in (*self._work, *self._work_behind):
                        done.set_exception(ShuttingDown("the server is stopping"))
                    return
            self._turn_once()  # whose locals keep nothing alive while the loop waits

    def _has_turn(self) -> bool:
        """Whether there is something to do now, or an end."""
        if self._stopping or self._work or any(not task.behind for task in self._tasks):
            return True
        return bool(self._work_behind or self._tasks) and self._may_run_behind()

    def _turn_once(self) -> None:
        self._do_work()
        with self._changed:
            waiting = list(self._tasks)
        try:
            tasks = self._last = self._schedule(list(waiting))
            if tasks:
                self._run(tasks)
            self._postprocess(tasks)
        except Exception as error:  # a fault of ours: nobody shall wait for ever, and the next may fare better
            self._end(waiting, error)
            self._forget_ended()

    def _do_work(self) -> None:
        """Does one thing of those that wait: then comes a step, so that neither holds the other up for long."""
        with self._changed:
            if self._work:
                work, behind = self._work.popleft(), False
            elif self._work_behind and self._may_run_behind():
                work, behind = self._work_behind.popleft(), True
            else:
                return
        began = time.perf_counter()
        settle(*work)
        now = time.perf_counter()
        if behind:
            self._credit -= now - began if self._in_front() else max(0.0, self._credit)
        elif began < self._front_until:  # a decoding, say
            self._front_until = now + GRACE_SECONDS

    def _in_front(self) -> bool:
        """Whether somebody is there before whom others have to give way, or was a moment ago."""
        return time.perf_counter() < self._front_until or any(not task.behind for task in self._tasks)

    def _may_run_behind(self) -> bool:
        return self._credit > 0 or not self._in_front()

    def _schedule(self, waiting: list[Task]) -> list[Task]:
        """Returns the tasks of the next step: those that give way in their share of the time, or where no other can."""
        in_front = [task for task in waiting if not task.behind]
        if self._credit > 0:
            return self._choose(waiting)
        if not in_front and self._in_front():
            return []
        return self._choose(in_front) or self._choose(waiting)

    def _choose(self, waiting: list[Task]) -> list[Task]:
        """Returns tasks for one step: of one kind, least served users first, as many as fit."""
        chosen, rows, cost, most_rows = list[Task](), 0, 0, self._most_rows
        of_user: Counter[str] = Counter()
        while waiting:
            # Those of one user, who may be behind everybody, not before all others of the same forward.
            task = min(waiting, key=lambda task: (self._behind(task), of_user[task.user_id]))
            waiting.remove(task)
            fits = not chosen or (
                task.kind == chosen[0].kind
                and not task.alone
                and rows + task.rows <= most_rows
                and cost + task.cost <= self._most_cost
            )
            if self._is_wanted(task) and fits and self._has_slot(task):
                if not chosen and self._knee is not None:
                    most_rows = min(most_rows, self._knee.rows(task.model, task.shape, task.rows))
                chosen.append(task)
                rows, cost = rows + task.rows, cost + task.cost
                of_user[task.user_id] += task.rows
                if task.alone:
                    break
        return chosen

    def _behind(self, task: Task) -> float:
        """Returns what its user was given, for a task whose turn it is as if that were less."""
        return self._served[task.user_id] - (TURN_SECONDS if task in self._last else 0.0)

    def _is_wanted(self, task: Task) -> bool:
        try:
            task.check()
        except Exception as error:
            self._end([task], error)
            return False
        return True

    def _has_slot(self, task: Task) -> bool:
        """Takes a slot for the task unless it has one. Returns False when it has to wait, or cannot have any."""
        if task.slot is None:
            try:
                task.slot = task.model.acquire(task.adapter) if task.adapter else NO_ADAPTER
            except SlotsFull:
                return False
            except Exception as error:
                self._end([task], error)
                return False
        return True

    def _run(self, tasks: Sequence[Task]) -> None:
        """Moves every task on by one call of the UNet. One that fails, whatever it is, fails alone."""
        began = time.perf_counter()
        failure: Exception | None = None
        try:
            stepped = step(tasks)
        except Exception as error:
            # Where memory ran out, or others are to be tried, the frames must not hold what this forward made.
            tell = len(tasks) == 1 and not is_out_of_memory(error)
            failure = error if tell else error.with_traceback(None)
        if failure is None:
            self._move_on(tasks, stepped, time.perf_counter() - began)
        elif len(tasks) == 1:
            self._end(tasks, failure)
        else:  # memory may suffice for one by one, and whose fault it was shows
            if is_out_of_memory(failure):
                self._most_cost = sum(task.cost for task in tasks) / 2
                self._free_memory()
            for task in tasks:
                self._run([task])

    def _move_on(self, tasks: Sequence[Task], stepped: Sequence[Stepped], seconds: float) -> None:
        rows = sum(task.rows for task in tasks)
        a_row = seconds / rows
        behind = a_row * sum(task.rows for task in tasks if task.behind)
        if any(not task.behind for task in tasks):
            self._front_until = time.perf_counter() + GRACE_SECONDS
        earned = (seconds - behind) * self._share / (1 - self._share)
        self._credit = min(MOST_CREDIT, self._credit + earned - (behind if self._in_front() else 0.0))
        if self._knee is not None:
            self._knee.note(tasks[0].model, tasks[0].shape, rows, seconds)
        for task, made in zip(tasks, stepped, strict=True):
            task.state, task.foreseen = made.state, made.foreseen
            task.done += 1
            task.seconds += a_row * task.rows
            self._served[task.user_id] += a_row * task.rows

    def _postprocess(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.ended.done():
                continue
            try:
                if not torch.isfinite(task.latents).all():
                    raise BadPicture("the model lost its way: the latents are not finite")
                task.on_call(task.done, task.foreseen)
            except Exception as error:
                self._end([task], error)
                continue
            if task.done == task.schedule.calls:
                task.ended.set_result(task.latents)
        self._forget_ended()

    def _forget_ended(self) -> None:
        with self._changed:
            for task in self._tasks:
                if task.ended.done() and task.slot is not None:
                    slot, task.slot = task.slot, None
                    try:
                        task.model.release(slot)
                    except Exception as error:  # the device is gone: the others hear of it from their own steps
                        log.error("slot_not_released", exc_info=error)
            self._tasks = [task for task in self._tasks if not task.ended.done()]
            self._last = [task for task in self._last if not task.ended.done()]
            present = {task.user_id for task in self._tasks}
            for user in self._served.keys() - present:
                del self._served[user]

    def _end(self, tasks: Iterable[Task], error: Exception) -> None:
        for task in tasks:
            if not task.ended.done():
                task.ended.set_exception(error)
