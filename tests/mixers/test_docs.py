"""The documentation of the mixers says what the code does."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from linnet import _catalogue
from linnet.mixers import _registry, build_mixer, get_mixer, list_mixers

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", list_mixers())
def test_the_page_of_a_mixer_lists_its_options_and_defaults(name):
    page = (DOCS / "mixers" / f"{name}.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, re.M))
    options = {f.name: f.default for f in dataclasses.fields(get_mixer(name).Config) if f.name != "d_model"}
    assert rows == {key: f'"{value}"' if isinstance(value, str) else str(value) for key, value in options.items()}
    for heading in ("## Recurrence", "**Operator.**", "**Paper.**", "**State.**", "**Cost.**", "## What differs"):
        assert heading in page


@pytest.mark.parametrize("name", list_mixers())
def test_the_table_of_mixers_is_current(name):
    rows = {line.split("|")[1].strip(): line for line in (DOCS / "mixers" / "index.md").read_text().splitlines() if "|" in line}
    assert rows.get(f"[`{name}`]({name}.md)") == _catalogue.row(name), "run: linnet info --mixers --write docs/mixers/index.md"


def test_a_row_of_the_table_holds_what_the_mixer_says():
    entry = _catalogue.entry("gla")
    assert entry.paper.startswith("Yang et al., [Gated Linear Attention Transformers") and "abs/2312.06635" in entry.paper
    assert entry.year == "2023" and entry.recurrence == "S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T"
    assert entry.state == "32,768: S 4x64x128" and entry.operators == "`linear_attention`"
    assert entry.options.startswith("`heads`, ") and "`gate_rank`" in entry.options and entry.lines > 50
    assert _catalogue.entry("attention").state == "1,024 t + 1: k tx4x128, v tx4x128, length 1"
    assert _catalogue.entry("s4d").operators == "`long_conv`, `scan`"  # without a state, with one


def test_the_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{_catalogue.BEGIN}\nold\n{_catalogue.END}\nafter\n")
    _catalogue.write(page, ["gla"])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines and lines[4] == _catalogue.row("gla")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="--write"):
        _catalogue.write(page)


STATE_NUMBERS = {  # per row at d = 512 with 4 heads, as the pages say
    "linear_transformer": 512**2 // 4 + 512,
    "hedgehog": 2 * 512**2 // 4 + 2 * 512,
    "t2r": 512**2 // 4 + 512,
    "performer": 4 * (621 * 128 + 621 + 1),
    "softmax_rnn": 153 * 512 + 153 * 4 + 1,
    "rpe_kernel": (2 * 512 + 1) * 511,
    "monarch_mixer": 3 * 512 * 2 + 2 * 512 * 1023,
    "based": 153 * 512 + 153 * 4,
    "rebased": 136 * 512 + 136 * 4,
    "cosformer": 2 * 512**2 // 4 + 2 * 512 + 1,
    "retnet": 2 * 512**2 // 4 + 1,
    "lightning": 512**2 // 4 + 1,
    "transnormer": 2 * 63 * 512 + 1,
    "gla": 512**2 // 8,
    "gsa": 2 * 512 * 128,
    "lightnet": 512**2 // 4 + 512,
    "mlstm": 512**2 // 8 + 512 // 2 + 4,
    "rwkv4": 4 * 512,
    "rwkv6": 512 + 512 * 128,
    "mamba": 38 * 512,
    "mamba2": 2 * 512 * 128 + 3 * (2 * 512 + 2 * 128),
    "hgrn": 512,
    "hgrn2": 512**2 // 4,
    "mamba3": 258 * 512 + 161 * 4,
    "slstm": 7 * 512,
    "al_rnn": 512,
    "rg_lru": 4 * 512,
    "mlstm_block": 1024**2 // 4 + 4 * 1024 + 4,
    "s4d": 64 * 512,
    "dlr": 2048 * 512,
    "lru": 2 * 512,
    "lssl": 64 * 512,
    "fsmn": 20 * 512,
    "deltanet": 512**2 // 4 + 9 * 512,
    "gated_deltanet": 9 * 512**2 // 8 // 4 + 9 * 512,
    "kda": 512**2 // 4 + 9 * 512,
    "gated_deltanet2": 512**2 // 4 + 9 * 512,
    "kaczmarz": 9 * 512**2 // 8 // 4 + 9 * 512,
    "comba": 9 * 512**2 // 8 // 4 + 9 * 512,
    "gated_deltaproduct": 9 * 512**2 // 8 // 4 + 3 * 21 * 512 // 4,
    "deltaproduct": 9 * 512**2 // 8 // 4 + 3 * 21 * 512 // 4,
    "osdn": 512**2 // 4 + 512 + 9 * 512,
    "preconditioned_deltanet": 9 * 512**2 // 8 // 4 + 3 * 512 // 4 + 9 * 512,
    "mesa": 2 * 512**2 // 4 + 6 * 512,
    "rls": 2 * 512**2 // 4 + 6 * 512,
    "dplr": 512**2 // 4 + 12 * 512,
    "mom": 5 * (512**2 // 4 + 9 * 512),
    "sse": 5 * 512**2 // 4,
    "sse_hybrid": 5 * 512**2 // 4,
    "rwkv7": 512 + 512 * 128,
    "ttt_linear": 2 * (512**2 // 4 + 512) + 6 * 512 + 1,
    "ttt_mlp": 16 * 512**2 // 4 + 10 * 512 + 6 * 512 + 1,
    "titans": 12 * 512**2 // 4 + 9 * 512 + 2 * 127 * 512 + 2,
    "wersa": 2 * 15 * 512 + 32 * 512 + 1024 * 512 + 1024 * 4,
}


@pytest.mark.parametrize("name", STATE_NUMBERS)
def test_the_state_sizes_in_the_pages(name):
    shapes = build_mixer(name, 512, 4).state_spec().shapes
    assert sum(torch.Size(shape).numel() for shape in shapes) == STATE_NUMBERS[name]


def test_the_example_of_add_a_mixer_runs(tmp_path, monkeypatch):
    page = (DOCS / "add_a_mixer.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = blocks[0]
    assert len(code.splitlines()) <= 70 and "@register_mixer" in code
    (tmp_path / "write_gate_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        scope = vars(importlib.import_module("write_gate_example"))
        for block in blocks[1:]:
            exec(compile(block, "add_a_mixer.md", "exec"), scope)
        assert "write_gate" in list_mixers()
        mixer = build_mixer("write_gate", 16, 2).double()
        x = torch.randn(1, 9, 16, dtype=torch.float64)
        context = scope["Context"](return_state=True)
        whole, state = mixer(x, context=context)
        first, state = mixer(x[:, :4], context=context)
        rest, state = mixer(x[:, 4:], state, context=context)
        torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-10, atol=1e-10)
        assert [tuple(part.shape[1:]) for part in state] == list(mixer.state_spec().shapes)
        with pytest.raises(ValueError, match="write_gate: option 'heads'"):
            build_mixer("write_gate", 16, 3)
    finally:
        _registry._registry.pop("write_gate", None)
        sys.modules.pop("write_gate_example", None)
