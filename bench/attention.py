"""Why no attention slicing on a CPU: PyTorch's SDPA against diffusers' sliced attention, time and peak memory.

The layer is SD 1.5's largest at 512×512: 4,096 tokens, 8 heads of 40, two rows (guidance).
"""

import subprocess
import sys
from collections.abc import Iterator

from bench.figures import Figure

MEASURE = """
import sys, time, torch
from pathlib import Path
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
processor = AttnProcessor2_0() if sys.argv[1] == "sdpa" else SlicedAttnProcessor(slice_size=int(sys.argv[1]))
layer = Attention(320, heads=8, dim_head=40, processor=processor)
x = torch.randn(2, 4096, 320)
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
with torch.inference_mode():
    layer(x[:, :64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
    before = status("VmRSS")
    times = []
    for _ in range(5):
        began = time.perf_counter(); layer(x); times.append(time.perf_counter() - began)
print(sorted(times)[2], status("VmHWM") - before)
"""


def figures() -> Iterator[Figure]:
    """Median seconds and extra peak bytes of one call, each way in a process of its own."""
    for way, name in (("sdpa", "SDPA"), ("4", "sliced, half of the heads"), ("1", "sliced, one head")):
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, way]
        took, extra = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        yield Figure(f"{name}: one call", float(took), "s")
        yield Figure(f"{name}: extra peak memory", float(extra), "bytes")
