"""Long sequences: the forward of every linear-time mixer over 65,536 tokens in fp32 stays near its fp64 reference.

    python -m pytest -m slow tests/laws/test_long_sequences.py
    python tests/laws/test_long_sequences.py docs          measure, write docs/measured/long_sequences.json and the page's table

The reference is the same mixer with the same weights and inputs in double precision, on the same backend. Compared are the
outputs at 16 positions spread over the sequence. Which mixers take part is a rule, not a list: those whose state has a constant
size. A state that grows with the tokens means softmax-like attention, whose work is quadratic; a mixer without a state sees the
whole sequence and has no long run to drift in.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from linnet.mixers import build_mixer, get_mixer, list_mixers

TOKENS, WIDTH, HEADS, POSITIONS, TOLERANCE = 65_536, 32, 2, 16, 1e-3
SMALL = {  # sizes that do not follow the width, and lengths that must be known beforehand
    "cosformer": {"max_length": TOKENS},
    "monarch_mixer": {"max_length": TOKENS},
    "dlr": {"d_state": 64},
    "mamba2": {"d_state": 16},
    "mamba3": {"d_state": 16},
    "s4d": {"d_state": 16},
    "lssl": {"d_state": 16},
    "performer": {"num_features": 32},
    "gsa": {"slots": 16},
    "mesa": {"cg_steps": 10},
    "rls": {"cg_steps": 10},
    "rwkv6": {"shift_rank": 8, "decay_rank": 8},
    "rwkv7": {r: 8 for r in ("decay_rank", "a_rank", "value_rank", "gate_rank")},
}
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def build(name: str) -> torch.nn.Module:
    """The second of two layers with default options, its parameters moved a little, so that none is silent (zero, one)."""
    torch.manual_seed(0)
    mixer = build_mixer(name, WIDTH, HEADS, layer_index=1, num_layers=2, **SMALL.get(name, {}))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return mixer


def excluded(mixer: torch.nn.Module) -> str | None:
    """Why this mixer does not take part."""
    if not mixer.causal:
        return "sees the whole sequence: no state"
    if any(None in shape for shape in mixer.state_spec().shapes):
        return "the state grows with the tokens: quadratic"
    return None


@torch.no_grad()
def measure(name: str) -> dict[str, object]:
    """{mixer, finite, error: relative RMSE over the positions, worst: the largest at one of them, seconds of the fp32 forward}."""
    mixer = build(name)
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    at = torch.linspace(0, TOKENS - 1, POSITIONS).long()
    began = time.perf_counter()
    y = mixer(x)[0]
    seconds = time.perf_counter() - began
    finite = bool(y.isfinite().all())
    y = y[0, at].double()
    reference = mixer.double()(x.double())[0][0, at]
    gap = (y - reference).norm(dim=1)
    return {
        "mixer": name,
        "finite": finite,
        "error": float(gap.norm() / reference.norm()),
        "worst": float((gap / reference.norm(dim=1)).max()),
        "seconds": round(seconds, 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list_mixers())
def test_the_forward_over_65536_tokens_stays_near_double(name):
    reason = excluded(build(name))
    if reason is not None:
        pytest.skip(reason)
    row = measure(name)
    assert row["finite"] and row["error"] < TOLERANCE, row


def test_only_mixers_without_a_constant_state_are_excluded():
    left_out = {name: excluded(build(name)) for name in list_mixers()}
    left_out = {name: reason for name, reason in left_out.items() if reason}
    assert "attention" in left_out and "gla" not in left_out
    for name, reason in left_out.items():
        assert "grows" in reason or get_mixer(name).causal is False, (name, reason)


def table(report: dict) -> str:
    lines = ["| mixer | relative RMSE | worst position | seconds (fp32) |", "| --- | --- | --- | --- |"]
    for r in report["rows"]:
        lines.append(f"| [`{r['mixer']}`]({r['mixer']}.md) | {r['error']:.1e} | {r['worst']:.1e} | {r['seconds']:.1f} |")
    return "\n".join(lines)


def test_the_page_shows_the_measured_table():
    report = json.loads((DOCS / "measured" / "long_sequences.json").read_text())
    page = (DOCS / "mixers" / "long_sequences.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table(report)
    assert all(row["finite"] and row["error"] < report["tolerance"] for row in report["rows"])


def main(docs: Path, names: list[str]) -> None:
    """Measure `names` (all mixers if empty), keep the earlier rows of the others, write the report and the table."""
    torch.set_num_threads(1)
    file, page = docs / "measured" / "long_sequences.json", docs / "mixers" / "long_sequences.md"
    known = list_mixers()
    rows = {r["mixer"]: r for r in json.loads(file.read_text())["rows"] if names} if file.exists() else {}
    left_out = {}
    for name in known:
        reason = excluded(build(name))
        if reason is not None:
            left_out[name] = reason
        elif not names or name in names:
            rows[name] = measure(name)
            print(json.dumps(rows[name]), flush=True)
    settings = {"tokens": TOKENS, "width": WIDTH, "heads": HEADS, "positions": POSITIONS, "tolerance": TOLERANCE}
    report = settings | {"torch": torch.__version__, "rows": [rows[n] for n in known if n in rows], "excluded": left_out}
    report["worst"] = max((r["error"] for r in report["rows"]), default=math.nan)
    file.write_text(json.dumps(report, indent=1) + "\n")
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
