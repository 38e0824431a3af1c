"""The table of all mixers, from the registry: what a class says of itself in its docstring, its options and its state.

`linnet info --mixers` prints it, and with `--write docs/mixers/index.md` it keeps that page current. The docstring of a mixer
begins with `Authors, "Title", year (arXiv id)`; its indented lines are formulas, two on a line with a comma and spaces between.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

D_MODEL, HEADS = 512, 4  # where the state is counted
BEGIN, END = "<!-- mixers: begin -->", "<!-- mixers: end -->"

_PAPER = re.compile(r'^(?P<authors>[^"]*?),? ?"(?P<title>[^"]+)", (?P<year>\d{4})(?: \(arXiv (?P<arxiv>[\d.]+)\))?')
_STEP = re.compile(r"(?P<state>[A-Za-z]\w*?(?:\^\w)?)_\{?t[^=\s]* = (?P<value>.*)")


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    paper: str
    year: str
    recurrence: str
    state: str
    operators: str
    options: str
    lines: int


def entry(name: str) -> Entry:
    """The row of a registered mixer."""
    from linnet.mixers import get_mixer

    cls = get_mixer(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    paper, year = _paper(re.sub(r"\s+", " ", text.partition("\n\n")[0]))
    options = ", ".join(f"`{f.name}`" for f in fields(cls.Config) if f.name != "d_model")
    source = Path(inspect.getsourcefile(cls)).read_text()
    return Entry(name, paper, year, _recurrence(text), _state(name), _operators(name), options, len(source.splitlines()))


def table(names: list[str] | None = None) -> str:
    """A Markdown table of the mixers; all registered ones where none are named."""
    from linnet.mixers import list_mixers

    columns = ("name", "paper", "year", "recurrence", "state per row", "operators", "options", "lines")
    rows = [f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*rows, *(row(name) for name in names or list_mixers())])


def row(name: str) -> str:
    """The line of one mixer in the table."""
    cells = asdict(entry(name)) | {"name": f"[`{name}`]({name}.md)"}
    cells["recurrence"] = f"`{cells['recurrence']}`" if cells["recurrence"] else "-"
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells.values()) + " |"


def write(page: Path, names: list[str] | None = None) -> None:
    """Replaces what stands between the two marks of the page."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"--write must name a page with the lines {BEGIN!r} and {END!r}; got {str(page)!r}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(names)}\n{END}{after}")


def _paper(sentence: str) -> tuple[str, str]:
    """(authors and linked title, year) of a first sentence; the whole sentence where it has another form."""
    found = _PAPER.match(sentence)
    if found is None:
        year = re.search(r"\b(?:19|20)\d\d\b", sentence)
        return sentence.rstrip("."), year[0] if year else "-"
    title = f"[{found['title']}](https://arxiv.org/abs/{found['arxiv']})" if found["arxiv"] else found["title"]
    return f"{found['authors']}, {title}", found["year"]


def _recurrence(text: str) -> str:
    """The step of the state: the longest X_t = ... X_{t-1} ... of S, of another matrix, of a vector; else the output."""
    block = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    parts = [part for line in block for part in re.split(r"[,;]\s{2,}", line)]
    steps = [(found["state"], found[0].rstrip(" ,;.")) for part in parts if (found := _STEP.search(part))]
    own = [(state, step) for state, step in steps if re.search(rf"(?<!\w){re.escape(state)}_\{{t(?:,j)?-1", step)]
    outputs = [(state, step) for state, step in steps if state in ("o", "y")]
    for chosen in ([x for x in own if x[0][0] == "S"], [x for x in own if x[0][0].isupper()], own, outputs, steps):
        if chosen:
            return max((step for state, step in chosen if state == chosen[0][0]), key=len)
    return parts[0].rstrip(" ,;.") if parts else ""


def _state(name: str) -> str:
    """Numbers that a row of the state holds at d = 512 with 4 heads, and its tensors; per token (t) where it grows."""
    import torch

    from linnet.mixers import build_mixer

    with torch.device("meta"):
        mixer = build_mixer(name, D_MODEL, HEADS)
    if not mixer.causal:
        return "-"
    spec = mixer.state_spec()
    count = lambda shape: math.prod(size for size in shape if size is not None)
    fixed = sum(count(shape) for shape in spec.shapes if None not in shape)
    grows = sum(count(shape) for shape in spec.shapes if None in shape)
    size = f"{grows:,} t + {fixed:,}" if grows else f"{fixed:,}"
    shapes = ("x".join("t" if size is None else str(size) for size in shape) or "1" for shape in spec.shapes)
    return f"{size}: " + ", ".join(f"{part} {shape}" for part, shape in zip(spec.names, shapes, strict=True))


def _operators(name: str) -> str:
    """The operators over time that a small layer calls: a pass without a state, a prefill, a step."""
    import torch

    from linnet import ops
    from linnet.mixers import Context, build_mixer
    from linnet.ops.norm import PER_TOKEN

    called: dict[str, None] = {}

    def record(op: str, backend: str | None, arguments: dict[str, Any]) -> Any:
        if op not in PER_TOKEN:
            called[op] = None
        return ops.execute(op, backend, arguments)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), ops.use_handler(record):
        mixer, x = build_mixer(name, 64, HEADS), torch.zeros(1, 8, 64)
        mixer(x)
        if mixer.causal:
            _, state = mixer(x, context=Context(return_state=True))
            mixer(x[:, :1], state, context=Context(return_state=True))
    return ", ".join(f"`{op}`" for op in called) or "-"
