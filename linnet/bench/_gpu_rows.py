"""What `linnet bench gpu` measures: for every row the operands, Linnet's call and the peers' calls on the same tensors.

Operands are declared by letters: B batch, T tokens, H heads, G groups of heads, K key channels, V value channels, D channels,
N states per channel, W taps, C rows of logits, X vocabulary. Peers are only called, and imported only when they are measured.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet import ops

IMPLEMENTATION, IN_PLACE = "linnet", "linnet-in-place"
Sizes = dict[str, int]
Operands = dict[str, Tensor]
Draw = Callable[[Tensor, Operands], Tensor]  # from standard normal numbers in fp32 and the operands made before
BOUND = -5.0  # log-decay per token declared by the bounded rows
RWKV_BOUND = -0.6065307  # -e^-0.5, the bound of RWKV-7's decay


@dataclass(frozen=True)
class Operand:
    letters: str
    draw: Draw
    half: bool = True  # held in the 16-bit type; gates are fp32


@dataclass(frozen=True)
class Peer:
    """A function of another package. load() imports it and returns f(operands) -> o; step, if any, f(operands, state).

    Package "linnet": the step in place, beside the operator that returns a new state.
    """

    package: str
    load: Callable[[], Callable[[Operands], Tensor]] | None
    step: Callable[[], Callable[..., Any]] | None = None
    heads_first: bool = False  # wants [B, H, T, ...]; the operands are laid out so before anything is timed
    unlock: Callable[[], Any] | None = None  # context in which a refused gradient runs all the same

    def missing(self) -> bool:
        return importlib.util.find_spec(self.package) is None


@dataclass(frozen=True)
class Row:
    """run(operands, **options) -> (o, state) is Linnet's call; None: a row of peers only."""

    name: str
    title: str
    operands: dict[str, Operand]
    run: Callable[..., tuple[Tensor, Any]] | None
    output: str
    peers: dict[str, Peer] = field(default_factory=dict)
    sets: tuple[str, ...] = ("main",)
    constants: tuple[str, ...] = ()  # operands without a gradient
    state: dict[str, str] = field(default_factory=dict)  # letters of the state, for decoding
    derive: Callable[[Sizes], Sizes] = lambda s: s
    own_gradient: bool = False  # run returns (o, gradient of its first operand) itself

    def sizes(self, shape: Sizes) -> Sizes:
        """Every letter's size for a shape of B, T, H, K, V."""
        return self.derive({"D": shape["H"] * shape["V"], "N": 16, "G": 1, "W": 4, **shape})

    def make(
        self, shape: Sizes, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **draws: Draw
    ) -> Operands:
        """The operands; `draws` replaces how some are drawn."""
        rng = torch.Generator(device=device).manual_seed(seed)
        sizes, x = self.sizes(shape), {}
        for name, operand in self.operands.items():
            n = torch.randn([sizes[c] for c in operand.letters], generator=rng, device=device)
            value = draws.get(name, operand.draw)(n, x)
            x[name] = value.to(dtype) if operand.half and value.is_floating_point() else value
        return x


def traffic(row: Row, x: Operands, output: int, state: int = 0) -> tuple[int, int]:
    """Bytes with every input read once and every output written once: forward, forward + backward. output, state: bytes."""
    inputs = sum(a.nbytes for a in x.values())
    learned = sum(a.nbytes for n, a in x.items() if n not in row.constants and a.is_floating_point())
    forward = inputs + output + 2 * state
    return forward, forward + learned if row.own_gradient else 2 * (inputs + output) + learned


# how operands are drawn


def plain(n: Tensor, x: Operands) -> Tensor:
    return n


def unit(n: Tensor, x: Operands) -> Tensor:
    return F.normalize(n, dim=-1)


def sigmoid(n: Tensor, x: Operands) -> Tensor:
    return torch.sigmoid(n)


def mild(n: Tensor, x: Operands) -> Tensor:
    """A gated layer at its start: log-decays around -0.2."""
    return F.logsigmoid(n + 2)


def bounded(n: Tensor, x: Operands) -> Tensor:
    return mild(n, x).clamp_min(BOUND)


def retention(n: Tensor, x: Operands) -> Tensor:
    return (1 - 2.0 ** (-5 - torch.arange(n.shape[0], device=n.device, dtype=torch.float32))).log()


def s4d_real(n: Tensor, x: Operands) -> Tensor:
    return -torch.arange(1.0, n.shape[1] + 1, device=n.device).expand_as(n).contiguous()


# peers


def library(target: str, names: str = "", **fixed: Any) -> Callable[[], Callable[..., Tensor]]:
    """A loader of "module:function"; names: "ours=theirs ..." where the arguments are called otherwise."""
    renamed = dict(pair.split("=") for pair in names.split())

    def load() -> Callable[..., Tensor]:
        module, function = target.split(":")
        f = getattr(importlib.import_module(module), function)

        def call(x: Operands, state: Tensor | None = None) -> Tensor:
            more = {} if state is None else {"initial_state": state, "output_final_state": True}
            given = {renamed.get(n, n): a for n, a in x.items() if renamed.get(n) != "-"}  # "-": fixed inside the peer
            o = f(**given, **fixed, **more)
            return o[0] if isinstance(o, tuple) else o

        return call

    return load


@contextlib.contextmanager
def fla_unlocked() -> Iterator[None]:
    """fla refuses scalar-gate gradients on Hopper with Triton 3.4-3.7.0; inside, it computes them (they may be wrong)."""
    module = importlib.import_module("fla.ops.common.chunk_o")
    before, module.TRITON_ABOVE_3_7_1 = module.TRITON_ABOVE_3_7_1, True
    try:
        yield
    finally:
        module.TRITON_ABOVE_3_7_1 = before


def fla(chunk: str, recurrent: str = "", names: str = "", step_names: str | None = None, **fixed: Any) -> dict[str, Peer]:
    """fla's chunk form and its one-token form."""
    step = {n: v for n, v in fixed.items() if n in ("scale", "normalize")}
    one = library(f"fla.ops.{recurrent}", names if step_names is None else step_names, **step) if recurrent else None
    return {"fla": Peer("fla", library(f"fla.ops.{chunk}", names, **fixed), one, unlock=fla_unlocked)}


def fla_module(target: str, names: str = "", **fixed: Any) -> dict[str, Peer]:
    return {"fla": Peer("fla", library(f"fla.modules.{target}", names, **fixed))}


def tfla(target: str) -> dict[str, Peer]:
    """The chunkwise kernels of mlstm_kernels."""
    module = f"mlstm_kernels.torch.chunkwise.{target}"
    load = library(module, "i=i f=f", autocast_kernel_dtype=torch.bfloat16)
    return {"mlstm_kernels": Peer("mlstm_kernels", load, heads_first=True)}


def sdpa(backend: str) -> Peer:
    def load() -> Callable[[Operands], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call(x: Operands) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                o = F.scaled_dot_product_attention(*(x[n].transpose(1, 2) for n in "qkv"), is_causal=True)
            return o.transpose(1, 2)

        return call

    return Peer("torch", load)


def torch_loss() -> Callable[[Operands], Tensor]:
    return lambda x: F.cross_entropy(x["logits"], x["target"], reduction="none")


# Linnet's calls

SEQUENCE = ("main", "length", "few-heads", "wide")
MATRIX = (*SEQUENCE, "decode")
STATE = {"S": "BHKV"}
QKV = {"q": Operand("BTHK", plain), "k": Operand("BTHK", plain), "v": Operand("BTHV", plain)}
DELTA = {"q": Operand("BTHK", unit), "k": Operand("BTHK", unit), "v": Operand("BTHV", plain)}
SCALAR, VECTOR = Operand("BTH", mild, half=False), Operand("BTHK", mild, half=False)
BOUNDED = Operand("BTHK", bounded, half=False)
BETA = Operand("BTH", sigmoid)


def linear(**fixed: Any) -> Callable[..., tuple[Tensor, Any]]:
    return lambda x, **options: ops.linear_attention(**x, **fixed, **options)


def delta(**fixed: Any) -> Callable[..., tuple[Tensor, Any]]:
    return lambda x, **options: ops.delta_rule(**x, **fixed, **options)


def mlstm(sigmoid_gate: bool) -> Callable[..., tuple[Tensor, Any]]:
    def run(x: Operands, **options: Any) -> tuple[Tensor, Any]:
        gain = F.logsigmoid(x["i"]) if sigmoid_gate else x["i"]
        return ops.linear_attention(
            x["q"], x["k"], x["v"], F.logsigmoid(x["f"]), log_gain=gain, normalizer="floor", **options
        )  # fmt: skip

    return run


def matrix(name: str, title: str, operands: dict[str, Operand], run, peers: dict[str, Peer] | None = None, **more: Any) -> Row:
    return Row(name, title, operands, run, "BTHV", peers or {}, **{"sets": MATRIX, "state": STATE, **more})


def in_place(row: Row) -> dict[str, Peer]:
    """Linnet's step on a pool of states, for the rows whose state is one matrix."""
    op = "dplr" if row.name == "dplr" else "delta_rule" if "erase" in row.operands else "linear_attention"
    fixed = {"scale": 1.0} if op == "dplr" else {}
    step = lambda: lambda x, **options: getattr(ops.decode, op)(**x, **fixed, **options)
    return {IN_PLACE: Peer("linnet", None, step)} if row.state == STATE and "decode" in row.sets else {}


def _rows() -> Iterator[Row]:
    """In order of importance: what a short run should measure first."""
    gate = {"log_decay": "g"}
    simple = fla("simple_gla:chunk_simple_gla", "simple_gla:fused_recurrent_simple_gla", "log_decay=g")
    yield matrix("linear-scalar", "linear attention, scalar decay", QKV | {"log_decay": SCALAR}, linear(), simple)
    gla = fla("gla:chunk_gla", "gla:fused_recurrent_gla", "log_decay=g", "log_decay=gk")
    vector = linear(log_decay_min=BOUND)
    yield matrix("linear-vector", "per-channel decay, bound -5 (GLA)", QKV | {"log_decay": BOUNDED}, vector, gla)
    gdn = "gated_delta_rule"
    peer = fla(f"{gdn}:chunk_{gdn}", f"{gdn}:fused_recurrent_{gdn}", "log_decay=g erase=beta")
    yield matrix("delta-scalar", "gated delta rule", DELTA | {"erase": BETA, "log_decay": SCALAR}, delta(), peer)
    peer = fla("kda:chunk_kda", "kda:fused_recurrent_kda", "log_decay=g erase=beta", safe_gate=True)
    yield matrix("kda", "KDA, bound -5", DELTA | {"erase": BETA, "log_decay": BOUNDED}, delta(log_decay_min=BOUND), peer)
    peer = fla("gdn2:chunk_gdn2", "gdn2:fused_recurrent_gdn2", "log_decay=g erase=b write=w", safe_gate=True)
    gates = {"erase": Operand("BTHK", sigmoid), "write": Operand("BTHV", sigmoid), "log_decay": BOUNDED}
    yield matrix("gdn2", "gated delta rule 2, bound -5", DELTA | gates, delta(log_decay_min=BOUND), peer)
    flash, cudnn = sdpa("FLASH_ATTENTION"), sdpa("CUDNN_ATTENTION")
    yield matrix("softmax", "causal softmax (SDPA)", QKV, None, {"cudnn": cudnn, "flash": flash}, sets=SEQUENCE, state={})
    tokens = DELTA | {
        "a": Operand("BTHK", lambda n, x: -F.normalize(n, dim=-1)),
        "b": Operand("BTHK", lambda n, x: -x["a"].float() * torch.sigmoid(n)),
        "log_decay": Operand("BTHK", lambda n, x: RWKV_BOUND * torch.sigmoid(n), half=False),
    }
    dplr, bound = "generalized_delta_rule", {"scale": 1.0, "lower_bound": RWKV_BOUND}
    peer = fla(f"{dplr}:chunk_dplr_delta_rule", f"{dplr}:fused_recurrent_dplr_delta_rule", "log_decay=gk", **bound)
    run = lambda x, **options: ops.dplr(**x, scale=1.0, log_decay_min=RWKV_BOUND, **options)
    yield matrix("dplr", "DPLR (RWKV-7)", tokens, run, peer)
    peer = fla("linear_attn:chunk_linear_attn", "linear_attn:fused_recurrent_linear_attn", normalize=False)
    yield matrix("linear-none", "linear attention, no decay", QKV, linear(), peer)
    gates = {"i": Operand("BTH", plain, half=False), "f": Operand("BTH", lambda n, x: n + 3, half=False)}
    state = {"S": "BHKV", "z": "BHK", "m": "BH"}
    for name, target in (("exp", "triton_xl_chunk:mlstm_chunkwise"), ("sigmoid", "triton_xl_chunk_siging:mlstm_siging_chunkwise")):
        run, peer = mlstm(name == "sigmoid"), tfla(f"{target}__xl_chunk")
        yield matrix(f"mlstm-{name}", f"mLSTM, {name} gate", QKV | gates, run, peer, state=state)
    yield matrix("linear-exact", "per-channel decay, any decay", QKV | {"log_decay": VECTOR}, linear())
    peer = fla("delta_rule:chunk_delta_rule", "delta_rule:fused_recurrent_delta_rule", "erase=beta")
    yield matrix("delta-none", "delta rule", DELTA | {"erase": BETA}, delta(), peer)
    peer = fla("retention:chunk_retention", "retention:fused_recurrent_retention", "log_decay=-")
    constant = QKV | {gate_name: Operand("H", retention, half=False) for gate_name in gate}
    yield matrix("linear-constant", "constant decay (RetNet)", constant, linear(), peer, constants=("log_decay",))
    heads = lambda s: {**s, "H": max(1, s["H"] * s["V"] // 64), "V": 64}
    ssd = {"q": Operand("BTGK", plain), "k": Operand("BTGK", plain), "v": Operand("BTHV", plain), "log_decay": SCALAR}
    run = linear(scale=1.0)
    yield Row("ssd", "SSD (Mamba-2: one group, P = 64)", ssd, run, "BTHV", sets=("main", "length", "few-heads"), derive=heads)
    scan = {
        "x_BTD": Operand("BTD", plain),
        "delta_BTD": Operand("BTD", lambda n, x: 0.1 * n.abs()),
        "A_DN": Operand(
            "DN", lambda n, x: -torch.arange(1.0, n.shape[1] + 1, device=n.device).expand_as(n).contiguous(), half=False
        ),
        "B_BTN": Operand("BTN", plain),
        "C_BTN": Operand("BTN", plain),
        "D_D": Operand("D", plain, half=False),
        "z_BTD": Operand("BTD", plain),
    }
    run = lambda x, **options: ops.selective_scan(**x, **options)
    yield Row("selective-scan", "selective scan (Mamba-1, N = 16)", scan, run, "BTD", sets=("main", "length"))
    conv = {"x_BTD": Operand("BTD", plain), "weight_DW": Operand("DW", plain, half=False)}
    run = lambda x, **options: ops.short_conv(**x, activation="silu", **options)
    peer = fla_module("causal_conv1d:causal_conv1d", "x_BTD=x weight_DW=weight", activation="silu")
    wide = lambda s: {**s, "D": s["H"] * (2 * s["K"] + s["V"])}
    yield Row("short-conv", "short convolution, 4 taps, SiLU", conv, run, "BTD", peer, derive=wide)
    norm = {"x": Operand("BTHV", plain), "gate": Operand("BTHV", plain), "weight": Operand("V", plain, half=False)}
    run = lambda x, **options: (ops.gated_rms_norm(**x, **options), None)
    peer = fla_module("norm.fused_norm_gate:rms_norm_gated", "gate=g", bias=None, activation="swish", eps=1e-5)
    yield Row("gated-rms-norm", "gated RMS norm", norm, run, "BTHV", peer)
    unit = {"x": Operand("BTHV", plain), "gate": Operand("BTHV", plain)}
    run = lambda x, **options: (ops.gated_linear_unit(**x, **options), None)
    yield Row("glu", "gated linear unit, SiLU", unit, run, "BTHV", fla_module("activations:swiglu", "gate=x x=y"))
    run = lambda x, **options: (ops.l2_norm(**x, **options), None)
    yield Row("l2-norm", "L2 norm", {"x": Operand("BTHK", plain)}, run, "BTHK", fla_module("norm.l2norm:l2norm"))
    loss = {
        "logits": Operand("CX", plain),
        "target": Operand("C", lambda n, x: (n.abs() * 1e6).long() % x["logits"].shape[1], half=False),
    }
    run = lambda x, **options: ops.softmax_cross_entropy(x["logits"], x["target"], **options)
    peer = fla_module("fused_cross_entropy.ops:cross_entropy_loss") | {"torch": Peer("torch", torch_loss)}
    rows = lambda s: {**s, "C": max(1, s["B"] * s["T"] // 8), "X": 256 * s["K"]}
    yield Row("cross-entropy", "cross-entropy", loss, run, "C", peer, derive=rows, constants=("target",), own_gradient=True)
    run = lambda x, **options: ops.scan(**x, **options)
    peer = fla("hgrn:fused_recurrent_hgrn", names="log_a=g")
    diagonal = {"x": Operand("BTD", plain), "log_a": Operand("BTD", mild, half=False)}
    yield Row("scan", "scan (vector state)", diagonal, run, "BTD", peer, sets=("main", "length"))


ROWS = {row.name: replace(row, peers=in_place(row) | row.peers) for row in _rows()}


def shape_sets() -> dict[str, list[Sizes]]:
    """The shapes of `--shapes`; B * T is 32768 wherever T allows it."""
    shape = lambda B, T, H=16, K=128: {"B": B, "T": T, "H": H, "K": K, "V": K}
    lengths = [2**n * 1024 for n in range(1, 8)]
    return {
        "main": [shape(8, 4096)],
        "few-heads": [shape(1, 32768, H) for H in (4, 8, 16)],
        "wide": [shape(8, 4096, 32, 64), shape(8, 4096, 8, 256)],
        "length": [shape(max(1, 32768 // T), T) for T in lengths],
        "decode": [shape(B, 1) for B in (1, 8, 64, 256)],
    }


def shape_name(shape: Sizes) -> str:
    return "".join(f"{letter}{shape[letter]}" for letter in "BTHKV")


def parse_shape(text: str) -> Sizes:
    """B8T4096H16K128V128 -> sizes."""
    import re

    found = dict(re.findall(r"([BTHKV])(\d+)", text))
    if sorted(found) != list("BHKTV") or shape_name(found) != text or min(map(int, found.values())) < 1:
        sets = ", ".join([*shape_sets(), "all"])
        raise ValueError(f"bench gpu: argument 'shapes' must be of {sets}, or like B8T4096H16K128V128; got {text!r}")
    return {letter: int(size) for letter, size in found.items()}
