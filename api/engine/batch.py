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
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor

from api.engine import sampler
from api.engine.adapters import Adapter
from api.engine.knee import Knee
from api.engine.sampler import Schedule
from api.engine.slots import NO_ADAPTER, Slots, SlotsFull
from api.engine.threads import settle
from api.engine.weights import is_out_of_memory
from api.errors import BadPicture, ShuttingDown

T = TypeVar("T")

log = structlog.get_logger()

TURN_SECONDS = 1.0
OnCall = Callable[[int, Tensor], None]
"""Called after each call of the UNet with how many are done and the latents; whatever it raises ends the task."""


@dataclass(eq=False)
class Task:
    """A request while it is drawn: its pictures, all at the same call.

    Args:
        model: the UNet that draws them, with slots for adapters; rows of one model share a forward.
        adapter: the LoRA that changes its rows, or None.
        user_id: whose turn it takes.
        schedule: the sampler's table.
        state: (pictures, STATE, channels, height, width) float32, see `sampler.start`.
        text: (rows, tokens, width): with guidance first the negative prompt for each picture, then the prompt.
        guidance_scale: 1 or less is no guidance.
        guidance_rescale: see https://arxiv.org/abs/2305.08891, section 3.4; 0 is none.
        generators: one for each picture, for samplers that add noise.
        alone: no other task's rows are in its forwards, so that nothing of it depends on who else is there.
        on_call: see `OnCall`.
        check: raises when the task is wanted no more; asked while it waits for its steps.
    """

    model: Slots
    adapter: Adapter | None
    user_id: str
    schedule: Schedule
    state: Tensor
    text: Tensor
    guidance_scale: float
    guidance_rescale: float
    generators: Sequence[torch.Generator]
    alone: bool = False
    on_call: OnCall = lambda done, latents: None
    check: Callable[[], None] = lambda: None
    done: int = 0
    seconds: float = 0.0  # its share of the time that its forwards took
    slot: int | None = None  # of its adapter, while it is drawn
    ended: "Future[Tensor]" = field(default_factory=Future)  # the latents (pictures, channels, height, width)

    @property
    def pictures(self) -> int:
        """How many are drawn."""
        return self.state.shape[0]

    @property
    def rows(self) -> int:
        """How many rows of the UNet's batch they take."""
        return self.text.shape[0]

    @property
    def latents(self) -> Tensor:
        """Returns what the pictures are so far: (pictures, channels, height, width)."""
        return self.state[:, 0]

    @property
    def shape(self) -> Hashable:
        """The shape of its rows."""
        return self.state.shape[2:], self.text.shape[1:]

    @property
    def kind(self) -> Hashable:
        """What tasks must have in common to share a forward."""
        return self.model, self.shape

    @property
    def cost(self) -> int:
        """What a step costs the device: rows × latent cells."""
        return self.rows * self.state.shape[-1] * self.state.shape[-2]


class Batch:
    """Draws tasks, many at once, on a thread of its own.

    Args:
        most_rows: of one forward; a task that alone has more is drawn alone.
        free_memory: hands memory that nothing refers to back to the device.
        knee: finds out how many rows pay; None for as many as there are.
        takes_work: whether `run` has things done on the loop's thread, see `threads`.
    """

    def __init__(
        self,
        most_rows: int,
        free_memory: Callable[[], None] = lambda: None,
        knee: Knee | None = None,
        takes_work: bool = False,
    ) -> None:
        self._takes_work = takes_work
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
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
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is stopping")
            present = {other.user_id for other in self._tasks}
            if task.user_id not in present:
                least = min((self._served[user] for user in present), default=0.0)
                self._served[task.user_id] = max(self._served[task.user_id], least) if present else 0.0
            self._tasks.append(task)
            self._changed.notify()
        return task.ended.result()

    def run(self, action: Callable[[], T]) -> T:
        """Returns what `action` does, between two steps where the loop takes work. Blocks; not for the loop's thread.

        Raises:
            ShuttingDown: the server stops.
            Exception: what `action` raises.
        """
        if not self._takes_work:
            return action()
        done = Future[T]()
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is stopping")
            self._work.append((done, action))
            self._changed.notify()
        return done.result()

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
                self._changed.wait_for(lambda: self._tasks or self._work or self._stopping)
                if self._stopping:
                    self._end(self._tasks, ShuttingDown("the server is stopping"))
                    for done, _ in self._work:
                        done.set_exception(ShuttingDown("the server is stopping"))
                    return
            self._turn_once()  # whose locals keep nothing alive while the loop waits

    def _turn_once(self) -> None:
        with self._changed:
            waiting = list(self._tasks)
            work = self._work.popleft() if self._work else None
        if work is not None:  # one thing, then a step: neither holds the other up for long
            settle(*work)
        try:
            tasks = self._last = self._schedule(list(waiting))
            if tasks:
                self._run(tasks)
            self._postprocess(tasks)
        except Exception as error:  # a fault of ours: nobody shall wait for ever, and the next may fare better
            self._end(waiting, error)
            self._forget_ended()

    def _schedule(self, waiting: list[Task]) -> list[Task]:
        """Returns the tasks of the next step: of one kind, least served users first, as many as fit."""
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
                    most_rows = min(most_rows, self._knee.rows(task.model, task.shape))
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
            states = step(tasks)
        except Exception as error:
            # Where memory ran out, or others are to be tried, the frames must not hold what this forward made.
            tell = len(tasks) == 1 and not is_out_of_memory(error)
            failure = error if tell else error.with_traceback(None)
        if failure is None:
            self._move_on(tasks, states, time.perf_counter() - began)
        elif len(tasks) == 1:
            self._end(tasks, failure)
        else:  # memory may suffice for one by one, and whose fault it was shows
            if is_out_of_memory(failure):
                self._most_cost = sum(task.cost for task in tasks) / 2
                self._free_memory()
            for task in tasks:
                self._run([task])

    def _move_on(self, tasks: Sequence[Task], states: Sequence[Tensor], seconds: float) -> None:
        rows = sum(task.rows for task in tasks)
        a_row = seconds / rows
        if self._knee is not None:
            self._knee.note(tasks[0].model, tasks[0].shape, rows, seconds)
        for task, state in zip(tasks, states, strict=True):
            task.state = state
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
                task.on_call(task.done, task.latents)
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


@torch.inference_mode()
def step(tasks: Sequence[Task]) -> Sequence[Tensor]:
    """Returns the next state of each task, by one forward for the rows of all.

    Nothing of the tasks is changed but their generators, where fresh noise is drawn.

    Args:
        tasks: of one kind.
    """
    model = tasks[0].model
    states = torch.cat([task.state for task in tasks])
    predictions = _guided(tasks, _predict(model, tasks, states))
    coefficients = torch.cat([_of_pictures(task, task.schedule.coefficients[task.done]) for task in tasks])
    noise = _noise(tasks)
    after = sampler.step(states, predictions, coefficients.to(states.device), noise)
    return torch.split(after, [task.pictures for task in tasks])


def _predict(model: Slots, tasks: Sequence[Task], states: Tensor) -> Tensor:
    """Returns what the UNet says of every row: (rows, channels, height, width) float32."""
    scales = torch.cat([_of_pictures(task, task.schedule.scales[task.done]) for task in tasks])
    latents = (states[:, 0] * scales.to(states.device)[:, None, None, None]).to(model.dtype)
    rows = latents[torch.tensor(_picture_of_rows(tasks))]
    timesteps = torch.cat([task.schedule.timesteps[task.done].expand(task.rows) for task in tasks]).to(states.device)
    text = torch.cat([task.text for task in tasks])
    return model.predict([task.slot or NO_ADAPTER for task in tasks for _ in range(task.rows)], rows, timesteps, text)


def _picture_of_rows(tasks: Sequence[Task]) -> list[int]:
    """Returns for each row which picture of all the tasks' it is of."""
    pictures, first = list[int](), 0
    for task in tasks:
        own = range(first, first + task.pictures)
        pictures += [*own] * (task.rows // task.pictures)
        first += task.pictures
    return pictures


def _guided(tasks: Sequence[Task], predicted: Tensor) -> Tensor:
    """Returns the prediction for every picture: u + g (c - u), https://arxiv.org/abs/2207.12598."""
    guided = []
    for task, rows in zip(tasks, torch.split(predicted, [task.rows for task in tasks]), strict=True):
        if task.rows == task.pictures:
            guided.append(rows)
            continue
        negative, positive = rows.chunk(2)
        both = negative + task.guidance_scale * (positive - negative)
        guided.append(_rescaled(both, positive, task.guidance_rescale) if task.guidance_rescale else both)
    return torch.cat(guided)


def _rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Returns `guided` with its spread moved towards that of `positive` (`rescale_noise_cfg` of diffusers)."""
    axes = list(range(1, guided.dim()))
    scaled = guided * (positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return share * scaled + (1 - share) * guided


def _noise(tasks: Sequence[Task]) -> Tensor | None:
    """Returns fresh noise for every picture whose sampler adds some, zeros for the others; None where none does."""
    if not any(task.schedule.needs_noise for task in tasks):
        return None
    return torch.cat([_fresh(task) if task.schedule.needs_noise else torch.zeros_like(task.latents) for task in tasks])


def _fresh(task: Task) -> Tensor:
    shape = (1, *task.latents.shape[1:])
    return torch.cat([torch.randn(shape, generator=one) for one in task.generators]).to(task.state.device)


def _of_pictures(task: Task, one: Tensor) -> Tensor:
    return one.expand(task.pictures, *one.shape)
