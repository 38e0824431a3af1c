"""`linnet bench cpu`: operators and layers on the CPU beside softmax attention and the layers of `transformers`.

Four parts: every matrix-state operator against causal softmax attention over T, with the crossover; the gated delta rule
against the one in `transformers` (time and peak memory); Mamba and Mamba-2 layers against theirs; one decoded token at
growing context. fp32, B = 1, H = 16, K = V = 128 unless --quick. Figures mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from linnet import ops
from linnet.bench._measure import forward_and_backward, machine, milliseconds, peak_mib, resident_peak_growth

MODULE = "linnet.bench.cpu"


def operands(T: int, H: int, K: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=rng)
    x = {name: randn(1, T, H, K) for name in ("q", "k", "v")}
    x["k"] = F.normalize(x["k"], dim=-1)
    x |= {"beta": torch.rand(1, T, H, generator=rng), "gate": torch.rand(1, T, H, K, generator=rng)}
    x |= {"scalar": -0.1 * torch.rand(1, T, H, generator=rng), "vector": -0.1 * torch.rand(1, T, H, K, generator=rng)}
    return x


def softmax(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def dplr(q, k, v, beta, g):
    return ops.dplr(q, k, v, -k, k * beta[..., None], g)[0]


def gdn2(q, k, v, erase, g):
    return ops.delta_rule(q, k, v, erase=erase, write=erase, log_decay=g)[0]


# name -> (function of the named operands, the operands)
OPERATORS = {
    "softmax (SDPA)": (softmax, "q k v"),
    "linear attention": (lambda q, k, v: ops.linear_attention(q, k, v)[0], "q k v"),
    "scalar decay": (lambda q, k, v, g: ops.linear_attention(q, k, v, g)[0], "q k v scalar"),
    "vector decay (GLA)": (lambda q, k, v, g: ops.linear_attention(q, k, v, g)[0], "q k v vector"),
    "delta rule": (lambda q, k, v, b: ops.delta_rule(q, k, v, erase=b)[0], "q k v beta"),
    "gated delta rule": (lambda q, k, v, b, g: ops.delta_rule(q, k, v, erase=b, log_decay=g)[0], "q k v beta scalar"),
    "KDA": (lambda q, k, v, b, g: ops.delta_rule(q, k, v, erase=b, log_decay=g)[0], "q k v beta vector"),
    "gated delta rule 2": (gdn2, "q k v gate vector"),
    "DPLR (RWKV-7)": (dplr, "q k v beta vector"),
}


def transformers_gated_delta_rule(q, k, v, beta, g):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=False)[0]


def crossover(results: dict[str, dict[int, tuple[float, float]]], lengths: list[int]) -> dict[str, dict[str, int | None]]:
    """The smallest measured T from which on an operator is faster than softmax attention, per direction."""
    base, out = results["softmax (SDPA)"], {}
    for name, times in results.items():
        if name != "softmax (SDPA)":
            out[name] = {}
            for i, direction in enumerate(("forward", "forward+backward")):
                slower = [T for T in lengths if times[T][i] >= base[T][i]]
                out[name][direction] = next((T for T in lengths if not slower or T > max(slower)), None)
    return out


def bench_operators(lengths: list[int], H: int, K: int) -> dict[str, dict[int, tuple[float, float]]]:
    results: dict[str, dict[int, tuple[float, float]]] = {}
    for T in lengths:
        x = operands(T, H, K)
        for name, (f, names) in OPERATORS.items():
            forward, both = forward_and_backward(f, [x[n] for n in names.split()])
            results.setdefault(name, {})[T] = (milliseconds(forward), milliseconds(both, most=5))
            print(f"  T={T:<6} {name:<20} {results[name][T][0]:9.1f} {results[name][T][1]:9.1f} ms", flush=True)
    return results


def _delta_case(name: str, T: int, H: int, K: int):
    x = operands(T, H, K)
    f = transformers_gated_delta_rule if name == "transformers" else OPERATORS["gated delta rule"][0]
    return forward_and_backward(f, [x[n] for n in ("q", "k", "v", "beta", "scalar")])


def bench_delta(T: int, H: int, K: int, threads: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name in ("transformers", "linnet"):
        forward, both = _delta_case(name, T, H, K)
        rows[name] = {"forward_ms": milliseconds(forward), "forward_backward_ms": milliseconds(both, most=3)}
        for direction in ("forward", "both"):
            rows[name][f"{direction}_peak_mib"] = peak_mib(MODULE, f"{name},{direction},{T},{H},{K}", threads=threads)
    return rows


def memory_case(case: str) -> float:
    name, direction, T, H, K = case.split(",")
    _delta_case(name, 64, 1, 16)[1]()  # imports and lazily created pools are not part of the figure
    thunk = _delta_case(name, int(T), int(H), int(K))[0 if direction == "forward" else 1]
    return resident_peak_growth(thunk)


def layers(d_model: int):
    """(name, transformers layer, Linnet mixer) pairs of equal size, random weights."""
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    from linnet import build_mixer

    mamba = MambaMixer(MambaConfig(hidden_size=d_model, num_hidden_layers=1), layer_idx=0)
    heads = 2 * d_model // 64
    config = Mamba2Config(hidden_size=d_model, num_heads=heads, head_dim=64, n_groups=1, num_hidden_layers=1)
    mamba2 = Mamba2Mixer(config, layer_idx=0)
    yield "Mamba", mamba, build_mixer("mamba", d_model)
    yield "Mamba-2", mamba2, build_mixer("mamba2", d_model, heads)


def bench_layers(d_model: int, T: int) -> dict[str, dict[str, float]]:
    rows = {}
    x = torch.randn(1, T, d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, theirs, ours in layers(d_model):
            rows[name] = {"transformers_ms": milliseconds(lambda f=theirs: f(x)), "linnet_ms": milliseconds(lambda f=ours: f(x))}
    return rows


def bench_decode(contexts: list[int], H: int, K: int) -> dict[str, dict[int, dict[str, float]]]:
    """One token after `context` tokens: milliseconds and bytes of state."""
    rows: dict[str, dict[int, dict[str, float]]] = {"gated delta rule": {}, "softmax (SDPA)": {}}
    x = operands(1, H, K)
    with torch.no_grad():
        for T in contexts:
            past = operands(T, H, K)
            gates = {"erase": past["beta"], "log_decay": past["scalar"]}
            _, state = ops.delta_rule(past["q"], past["k"], past["v"], **gates, return_state=True)
            step = lambda s=state: ops.delta_rule(
                x["q"], x["k"], x["v"], erase=x["beta"], log_decay=x["scalar"], initial_state=s, return_state=True
            )
            rows["gated delta rule"][T] = {"ms": milliseconds(step, most=200, budget=1.0), "state_bytes": state[0].nbytes}
            _, cache = ops.softmax_attention(past["q"][:, :1], past["k"][:, :1], past["v"][:, :1], return_state=True)
            cache = (past["k"], past["v"], torch.full_like(cache[2], T))
            attend = lambda c=cache: ops.softmax_attention(x["q"], x["k"], x["v"], initial_state=c, return_state=True)
            size = sum(c.nbytes for c in cache)
            rows["softmax (SDPA)"][T] = {"ms": milliseconds(attend, most=50, budget=1.0), "state_bytes": size}
    return rows


def plot(results: dict, lengths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for i, (ax, title) in enumerate(zip(axes, ("forward", "forward + backward"), strict=True)):
        for name, times in results.items():
            style = {"color": "black", "linewidth": 2.5} if name.startswith("softmax") else {"marker": "o", "markersize": 3}
            ax.plot(lengths, [times[T][i] / T * 1e3 for T in lengths], label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="tokens T", title=title)
        ax.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds per token")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tables(report: dict) -> list:
    from rich.table import Table

    out = []
    lengths = [int(T) for T in next(iter(report["operators"].values()))]
    table = Table(title="milliseconds, forward | forward+backward; crossover: faster than softmax attention from T on")
    for column in ("operator", *(f"T={T}" for T in lengths), "crossover"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, times in report["operators"].items():
        cross = report["crossover"].get(name)
        text = "" if cross is None else " | ".join(str(cross[d] or "-") for d in ("forward", "forward+backward"))
        table.add_row(name, *(f"{a:.0f} | {b:.0f}" for a, b in times.values()), text)
    out.append(table)
    table = Table(title=f"gated delta rule, T={report['sizes']['delta_T']}: ms and MiB of peak memory, forward | forward+backward")
    for column in ("", "ms", "peak MiB"):
        table.add_column(column)
    for name, r in report["gated_delta_rule"].items():
        memory = f"{r['forward_peak_mib']:.0f} | {r['both_peak_mib']:.0f}"
        table.add_row(name, f"{r['forward_ms']:.0f} | {r['forward_backward_ms']:.0f}", memory)
    a, b = report["gated_delta_rule"]["transformers"], report["gated_delta_rule"]["linnet"]
    ratio = lambda key: f"{a[key] / max(b[key], 1e-9):.1f}x"
    memory = f"{ratio('forward_peak_mib')} | {ratio('both_peak_mib')}"
    table.add_row("ratio", f"{ratio('forward_ms')} | {ratio('forward_backward_ms')}", memory)
    out.append(table)
    table = Table(title=f"layers, d_model={report['sizes']['d_model']}, T={report['sizes']['layer_T']}: forward ms")
    for column in ("layer", "transformers", "linnet", "ratio"):
        table.add_column(column)
    for name, r in report["layers"].items():
        theirs, ours = r["transformers_ms"], r["linnet_ms"]
        table.add_row(name, f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.1f}x")
    out.append(table)
    table = Table(title="decoding one token: ms, bytes of state")
    contexts = list(next(iter(report["decode"].values())))
    for column in ("operator", *(f"after {int(T) // 1024}k" for T in contexts)):
        table.add_column(column)
    for name, r in report["decode"].items():
        table.add_row(name, *(f"{x['ms']:.2f}, {x['state_bytes'] / 2**20:.0f} MiB" for x in r.values()))
    out.append(table)
    return out


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="linnet bench cpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    parser.add_argument("--out", type=Path, default=None, help="folder for results.json and operators.png (must not hold results)")
    parser.add_argument("--memory-case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_case:
        print(memory_case(options.memory_case))
        return
    if options.out is not None and (options.out / "results.json").exists():
        raise ValueError(f"bench cpu: argument 'out' must be a folder without results.json; got {options.out}")
    from rich.console import Console

    quick = options.quick
    H, K = (4, 32) if quick else (16, 128)
    lengths = [256, 512] if quick else [1024, 2048, 4096, 8192, 16384]
    contexts = [1024, 4096] if quick else [1024, 4096, 16384, 65536]
    sizes = {"H": H, "K": K, "delta_T": 512 if quick else 4096, "d_model": 64 if quick else 1024, "layer_T": 128 if quick else 1024}
    console = Console()
    console.print(machine())
    report = {"machine": machine(), "sizes": sizes}
    report["gated_delta_rule"] = bench_delta(sizes["delta_T"], H, K, torch.get_num_threads())
    report["layers"] = bench_layers(sizes["d_model"], sizes["layer_T"])
    report["decode"] = bench_decode(contexts, H, K)
    report["operators"] = bench_operators(lengths, H, K)
    report["crossover"] = crossover(report["operators"], lengths)
    for table in tables(report):
        console.print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(report, indent=1))
        plot(report["operators"], lengths, options.out / "operators.png")
        console.print(f"written: {options.out}/results.json, {options.out}/operators.png")


if __name__ == "__main__":
    main()
