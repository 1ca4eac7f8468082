"""A request while it is drawn, and one step of several: a forward of the UNet for all their rows."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from api.engine import sampler
from api.engine.adapters import Adapter
from api.engine.sampler import Schedule
from api.engine.slots import NO_ADAPTER, Slots

OnCall = Callable[[int, Tensor], None]
"""Called after each call of the UNet with how many are done and the latents that it foresees at the end.

Whatever it raises ends the task.
"""


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
        behind: it gives way to those that are not, as `Batch.run_behind` does.
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
    behind: bool = False
    alone: bool = False
    on_call: OnCall = lambda done, latents: None
    check: Callable[[], None] = lambda: None
    done: int = 0
    seconds: float = 0.0  # its share of the time that its forwards took
    foreseen: Tensor = field(init=False)  # latents, see `sampler.foreseen`
    slot: int | None = None  # of its adapter, while it is drawn
    ended: "Future[Tensor]" = field(default_factory=Future)  # the latents (pictures, channels, height, width)

    def __post_init__(self) -> None:
        self.foreseen = self.latents

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


@dataclass(frozen=True)
class Stepped:
    """What a step made of a task: its next state, and the latents that it foresees at the end."""

    state: Tensor
    foreseen: Tensor


@torch.inference_mode()
def step(tasks: Sequence[Task]) -> Sequence[Stepped]:
    """Returns what one forward for the rows of all makes of each task.

    Nothing of the tasks is changed but their generators, where fresh noise is drawn.

    Args:
        tasks: of one kind.
    """
    states = torch.cat([task.state for task in tasks])
    given = states[:, 0] * _each(tasks, lambda task: task.schedule.scales[task.done])[:, None, None, None]
    predictions = _guided(tasks, _predict(tasks, given))
    coefficients = _each(tasks, lambda task: task.schedule.coefficients[task.done])
    after = sampler.step(states, predictions, coefficients, _noise(tasks))
    foreseen = sampler.foreseen(given, predictions, _each(tasks, lambda task: task.schedule.clean[task.done]))
    pictures = [task.pictures for task in tasks]
    return [Stepped(*both) for both in zip(torch.split(after, pictures), torch.split(foreseen, pictures), strict=True)]


def _predict(tasks: Sequence[Task], given: Tensor) -> Tensor:
    """Returns what the UNet says of every row: (rows, channels, height, width) float32."""
    model = tasks[0].model
    rows = given.to(model.dtype)[torch.tensor(_picture_of_rows(tasks))]
    timesteps = torch.cat([task.schedule.timesteps[task.done].expand(task.rows) for task in tasks]).to(given.device)
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


def _each(tasks: Sequence[Task], of: Callable[[Task], Tensor]) -> Tensor:
    """Returns for each picture what `of` says of its task, on the tasks' device."""
    said = [(one := of(task)).expand(task.pictures, *one.shape) for task in tasks]
    return torch.cat(said).to(tasks[0].state.device)
