"""A base in memory: the pipeline as it was loaded, and copies of its encoder and UNet that adapters ride on."""

import math

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from api.engine.adapters import Adapter, Group
from api.engine.slots import Slots
from api.engine.texts import Texts

# A UNet that is configured otherwise asks for more than latents, a timestep and text; only the stock call knows what.
ASKS_FOR: dict[str, tuple[str | None, ...]] = {
    "time_cond_proj_dim": (None,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text"),  # the second is made of the text that it is given anyway
    "encoder_hid_dim_type": (None,),
}


class Base:
    """What users' models have in common. Nothing ever writes to its pipeline's modules.

    Args:
        pipeline: as it was loaded.
        slots: how many adapters its UNet holds at once.
        compiled: whether its UNet is; not in copies for one adapter, or for those that change every layer.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, slots: int, compiled: bool = False) -> None:
        self.pipeline = pipeline
        self.unet = Slots(pipeline.unet, "unet", slots, compiled=compiled)
        # Few, as a slot of theirs takes many times as much.
        self._large: dict[Group, Slots] = {
            "delta": Slots(pipeline.unet, "unet", max(1, slots // 2)),
            "fast": Slots(pipeline.unet, "unet", max(1, slots // 2)),
        }
        self.texts = Texts(pipeline)

    @property
    def fits_the_batch(self) -> bool:
        """Whether the step loop gives its UNet everything that it asks for."""
        unet = self.pipeline.unet
        if not isinstance(unet, UNet2DConditionModel):
            return False
        return all(unet.config.get(name) in values for name, values in ASKS_FOR.items())

    def run_plain(self) -> None:
        """Has the UNet run as it is from now on, where it cannot be compiled."""
        self.unet.run_plain()

    def shared_unet(self, adapter: Adapter | None) -> Slots:
        """Returns the copy of the UNet that an adapter shares with others of its kind."""
        return self.unet if adapter is None else self._large.get(adapter.group, self.unet)

    def own_unet(self) -> Slots:
        """Returns a copy of the UNet's tree for one adapter of any rank, which nobody else has been in."""
        return Slots(self.pipeline.unet, "unet", count=1, highest_rank=math.inf)

    @property
    def slot_bytes(self) -> int:
        """Returns what the slots take beside the weights."""
        return sum(slots.nbytes for slots in self._unets()) + self.texts.slot_bytes

    def check(self) -> None:
        """Raises AccountingOff when a slot is lost, or two adapters are said to be in one."""
        self.texts.check()
        for slots in self._unets():
            slots.check()

    def drop(self, adapter: Adapter) -> None:
        """Forgets an adapter wherever a copy of it is."""
        self.texts.drop(adapter)
        for slots in self._unets():  # its combinations may be where it is not
            slots.drop(adapter)

    def _unets(self) -> list[Slots]:
        return [self.unet, *self._large.values()]
