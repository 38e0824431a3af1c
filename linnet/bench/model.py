"""`linnet bench model`: training a language model end to end, Linnet's and the same one of `fla.models` if that is installed.

    linnet bench model                                        0.36B Gated DeltaNet, 8 x 4096 tokens a step, bf16
    linnet bench model --layers kda --batch 4 --out DIR
    linnet bench model --processes 14                         compile what fla's kernels choose from in 14 processes first
    linnet bench model --device cpu --d-model 64 --num-layers 2 --heads 2 --vocabulary 256 --batch 2 --length 128

A step is forward, loss, backward, clipping and AdamW on random tokens: parameters in fp32, products in bf16 (on CUDA). Tokens per
second are from the median step, peak memory is of the whole process's tensors. Both models have K = V = d_model / heads, the same
MLP and tied embeddings; parameters are counted beside the times. fla's kernels tune themselves with shorter timings than their own,
and compute the gradients of scalar gates that they refuse on some GPUs. A layer with options in brackets is taken as it is, without
a peer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linnet.models import LinnetConfig, LinnetForCausalLM, parameter_groups

FILL_SECONDS = 300.0  # at most, for compiling the peer's kernels


@dataclass(frozen=True)
class Shape:
    d_model: int = 1024
    num_layers: int = 24
    heads: int = 8
    vocabulary: int = 32000
    batch: int = 8
    length: int = 4096

    @property
    def d_ff(self) -> int:
        return -(-8 * self.d_model // 3 // 64) * 64


@dataclass(frozen=True)
class Pair:
    """Options of a mixer and, by fla's names, of fla.models.<name> that make the same layer; {K}: channels per head."""

    name: str
    ours: str = "head_dim={K}, expand_v=1"
    head_dim: bool = True
    theirs: tuple[str, ...] = ("expand_v",)  # options that are 1


PAIRS = {
    "gated_deltanet": Pair("GatedDeltaNet"),
    "kda": Pair("KDA"),
    "deltanet": Pair("DeltaNet", "expand_k=1, expand_v=1", False, ("expand_k", "expand_v")),
    "gla": Pair("GLA", "expand_k=1, expand_v=1", False, ("expand_k", "expand_v")),
}


def linnet_model(shape: Shape, layer: str) -> nn.Module:
    if layer in PAIRS:
        layer = f"{layer}({PAIRS[layer].ours.format(K=shape.d_model // shape.heads)})"
    config = LinnetConfig(
        vocab_size=shape.vocabulary, d_model=shape.d_model, heads=shape.heads, layers=layer, num_layers=shape.num_layers,
        d_ff=shape.d_ff, use_cache=False,
    )  # fmt: skip
    return LinnetForCausalLM(config)


def fla_model(shape: Shape, layer: str) -> nn.Module:
    models, pair = importlib.import_module("fla.models"), PAIRS[layer]
    sizes: dict[str, Any] = dict.fromkeys(pair.theirs, 1.0)
    if pair.head_dim:
        sizes["head_dim"] = shape.d_model // shape.heads
    config = getattr(models, f"{pair.name}Config")(
        hidden_size=shape.d_model, num_hidden_layers=shape.num_layers, num_heads=shape.heads, intermediate_size=shape.d_ff,
        vocab_size=shape.vocabulary, max_position_embeddings=shape.length, tie_word_embeddings=True, use_cache=False, **sizes,
    )  # fmt: skip
    return getattr(models, f"{pair.name}ForCausalLM")(config)


def step_times(model: nn.Module, shape: Shape, device: str, steps: int, warm: int) -> dict[str, Any]:
    """Seconds of every step after `warm` of them, and of the first; losses; peak MiB on CUDA."""
    cuda = device.startswith("cuda")
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=cuda)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=rng).to(device)
    wait: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
    times, losses = [], []
    for _ in range(warm + steps):
        wait()
        began = time.perf_counter()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cuda):
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - began)
        losses.append(round(float(loss.detach()), 4))
    found = {"first": times[0], "seconds": times[warm:], "losses": losses}
    return found | ({"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if cuda else {})


def fill(shape: Shape, layer: str, device: str, processes: int) -> None:
    """Compile what the peer's kernels tune themselves over, into Triton's cache, each process its share."""
    from linnet.bench import _gpu_measure as measuring

    began = time.monotonic()
    one = replace(shape, num_layers=1, vocabulary=min(shape.vocabulary, 1024))  # the layers are alike
    jobs = [(one, layer, device, share, processes) for share in range(processes)]
    problems = {problem for _, problem in measuring.warm(jobs, processes, FILL_SECONDS, device, _fill_share) if problem}
    print(f"fla: first calls in {processes} processes, {time.monotonic() - began:.0f} s", *problems, flush=True)


def _fill_share(job: tuple[Shape, str, str, int, int]) -> tuple[str, str | None]:
    from linnet.bench import _gpu_measure as measuring

    shape, layer, device, share, shares = job
    measuring.take_share(share, shares)
    try:
        with _peer(device, quick=False):
            step_times(fla_model(shape, layer), shape, device, 1, 0)
    except Exception as error:  # noqa: BLE001 - the measurement will tell
        return layer, measuring.words(error)
    return layer, None


def measure(
    shape: Shape, layer: str, device: str, *, steps: int = 10, warm: int = 3, peers: bool = True, processes: int = 0
) -> Iterator[dict[str, Any]]:
    """One record per implementation, as they end; what fails is a record with its error. processes: see `fill`."""
    makers: dict[str, Callable[[Shape, str], nn.Module]] = {"linnet": linnet_model}
    if peers and device.startswith("cuda") and layer in PAIRS and importlib.util.find_spec("fla.models") is not None:
        makers["fla"] = fla_model
    for name, make in makers.items():
        record: dict[str, Any] = {"by": name, "layer": layer, "device": device, "torch": torch.__version__, **vars(shape)}
        torch.manual_seed(0)
        if processes and name == "fla":
            fill(shape, layer, device, processes)
        try:
            with _peer(device) if name == "fla" else contextlib.nullcontext():
                model = make(shape, layer)
                record["parameters"] = sum(p.numel() for p in model.parameters())
                record |= step_times(model, shape, device, steps, warm)
            record["tokens_per_second"] = round(shape.batch * shape.length / statistics.median(record["seconds"]))
            del model
        except Exception as error:  # a peer that breaks is a result
            record["error"] = f"{type(error).__name__}: {error}"[:500]
        gc.collect()
        if device.startswith("cuda"):
            record["gpu"] = torch.cuda.get_device_name()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield record


@contextlib.contextmanager
def _peer(device: str, quick: bool = True) -> Iterator[None]:
    """fla with gradients of scalar gates where it refuses them, and (quick) with a shorter tuning of its kernels."""
    from linnet.bench._gpu_measure import quick_tuning
    from linnet.bench._gpu_rows import fla_unlocked

    with fla_unlocked(), quick_tuning(device) if quick else contextlib.nullcontext():
        yield


def line(record: dict[str, Any]) -> str:
    head = f"{record['by']:8s} {record['layer']}"
    if "error" in record:
        return f"{head}: {record['error']}"
    median = statistics.median(record["seconds"])
    memory = f", peak {record['peak_mib']} MiB" if "peak_mib" in record else ""
    return (
        f"{head}: {record['parameters'] / 1e6:.1f}M parameters, {record['tokens_per_second']:,} tokens/s, "
        f"{median * 1e3:.1f} ms a step, first step {record['first']:.1f} s{memory}, "
        f"loss {record['losses'][0]} -> {record['losses'][-1]}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="linnet bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="gated_deltanet", help=f"a mixer; with a peer: {', '.join(PAIRS)}")
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3, help="steps before those that count")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="compile the peer's kernels in N processes first")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for model.json")
    options = parser.parse_args(argv)
    for name in (*vars(Shape()), "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"bench model: argument '{name}' must be >= 1; got {getattr(options, name)}")
    if options.processes < 0:
        raise ValueError(f"bench model: argument 'processes' must be >= 0; got {options.processes}")
    shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})
    if shape.d_model % shape.heads:
        raise ValueError(f"bench model: argument 'heads' must divide d_model = {shape.d_model}; got {shape.heads}")
    run = dict(steps=options.steps, warm=options.warm, peers=options.peers, processes=options.processes)
    for record in measure(shape, options.layers, options.device, **run):
        print(line(record), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / "model.json"
            before = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*before, record], indent=1))
    if options.out is not None:
        print(f"written: {path}")


if __name__ == "__main__":
    main()
