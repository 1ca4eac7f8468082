"""`python -m bench [name …]`: prints one line a figure, and writes docs/benchmarks.md when it ran them all."""

import sys
from pathlib import Path

from api.config import ROOT
from bench import attention, canary, drawing, engine, jobs, loading, model, pages, sd15, start, train
from bench.figures import Figure, page, quiet

BENCHES = {
    "start": ("Starting", start.figures),
    "loading": ("Loading models", loading.figures),
    "drawing": ("Drawing", drawing.figures),
    "engine": ("Many users' models over one base", engine.figures),
    "canary": ("Whose model draws", canary.figures),
    "jobs": ("Jobs", jobs.figures),
    "pages": ("The pages", pages.figures),
    "train": ("Training sitters", train.figures),
    "model": ("The bundled model", model.figures),
    "sd15": ("Stable Diffusion 1.5 on a CPU", sd15.figures),
    "attention": ("Attention on a CPU", attention.figures),
}

REMARKS = Path(__file__).with_name("remarks.md")  # renew them with the figures


def main(names: list[str]) -> None:
    """Runs the benches of these names, or all."""
    quiet()
    sections: dict[str, list[Figure]] = {}
    for name in names or BENCHES:
        title, figures = BENCHES[name]
        sections[title] = []
        for figure in figures():
            print(figure, flush=True)
            sections[title].append(figure)
        if not names:  # each time: whoever ends it early keeps what there is
            page(sections, ROOT / "docs" / "benchmarks.md", remarks=REMARKS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
