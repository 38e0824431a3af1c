r"""Steps in place, for serving: an operator's recurrence on states that live in a pool and are updated where they are.

Every function takes a few tokens (T >= 1), the operands of the operator of the same name in `linnet.ops`, and

    state:  [P, ...], the pool, one entry per sequence that is being served, of any floating dtype (computed in at least fp32);
    slots:  [B] int32, the pool's entry of each row of the batch; -1: the row is padding, nothing is read or written and its
            output is zero. No entry twice. None: row b has entry b.
    counts: [B] int32, the tokens of each row that enter the state, 0 .. T. None: all of them.
    update: False leaves the state as it is.
    output: False computes no output.

and returns the output of all T tokens, as that operator does from the same states, or None. Neither `counts` nor `update` changes
an output. So T drafted tokens are verified with `update=False`, and the accepted ones committed with `counts` and `output=False`:
a state never has to be rolled back.

Nothing is differentiable, nothing is read on the host: a CUDA graph replays a step with other slots, counts and operands.

Shape legend: B batch, T tokens, n steps per token, H heads, K key channels, V value channels, D channels, P entries of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import backends_of, call
from linnet.ops.elementwise import _conv_operands, _decay, _selective_operands, _sequence
from linnet.ops.recurrent import _common, _delta_gates, _dplr_directions, _scale


@dataclass(frozen=True)
class Form:
    """Which arguments of a training operator a step takes: per token, per step of a token, the same for all tokens.

    fixed: further arguments with the only values for which a step in place exists.
    """

    tokens: tuple[str, ...]
    steps: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.tokens + self.steps + self.constant

    def cut(self, arguments: dict[str, Any], rows: slice, tokens: slice) -> dict[str, Any]:
        """The training operator's arguments for some rows and tokens; an operand that all rows or tokens share stays."""
        n = arguments.get("steps_per_token", 1)
        cut = {name: arguments[name] for name in self.names}
        for names, width in ((self.tokens, 1), (self.steps, n)):
            for name in names:
                x = cut[name]
                if x is None or (name == "log_decay" and x.ndim <= 2):
                    continue
                x = x if x.shape[0] == 1 else x[rows]
                cut[name] = x if x.shape[1] == 1 else x[:, tokens.start * width : tokens.stop * width]
        return {**cut, **self.fixed, "return_state": True, "cu_seqlens": None}


NO_BOUND = {"log_decay_min": None}
NO_NORMALIZER = {"log_gain": None, "bonus": None, "normalizer": None, "normalizer_eps": None, "return_normalizer": False}
FORMS = {
    "linear_attention": Form(
        ("q", "log_decay"), ("k", "v"), ("read", "steps_per_token", "scale"), NO_NORMALIZER | NO_BOUND
    ),
    "delta_rule": Form(
        ("q", "log_decay"), ("k", "v", "erase", "write", "write_key"), ("erase_read", "read", "steps_per_token", "scale"), NO_BOUND
    ),
    "dplr": Form(("q", "k", "v", "a", "b", "log_decay"), (), ("scale",), NO_BOUND),
    "scan": Form(("x", "a", "log_a")),
    "selective_scan": Form(("x_BTD", "delta_BTD", "B_BTN", "C_BTN", "z_BTD"), (), ("A_DN", "D_D")),
    "short_conv": Form(("x_BTD",), (), ("weight_DW", "bias_D", "activation")),
    "softmax_attention": Form(
        ("q_BTHK", "k_BTHK", "v_BTHV"), (), ("scale",), {"causal": True, "window": None, "return_lse": False}
    ),
}  # fmt: skip
IRRELEVANT = ("log_decay_min", "normalizer_eps")  # arguments of any value that change no result of a step


def _indices(op: str, name: str, x: Tensor | None, rows: int, device: torch.device) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or tuple(x.shape) != (rows,) or x.dtype != torch.int32:
        check.refuse(op, name, f"an int32 tensor [{rows}] or None", check.describe(x))
    if x.device != device:
        check.refuse(op, name, f"on {device} like the other operands", f"a tensor on {x.device}")


def _pool(op: str, name: str, state: Tensor, entry: tuple[int, ...], letters: str, rows: int, slots: Tensor | None, like: Tensor):
    """Check a pool [P, *entry] and that a row has an entry."""
    layout = f"a floating-point tensor [P, {letters}] = [P, {', '.join(map(str, entry))}]"
    if not isinstance(state, Tensor) or state.ndim != len(entry) + 1 or tuple(state.shape[1:]) != tuple(entry):
        check.refuse(op, name, layout, check.describe(state))
    if not (state.is_floating_point() or (state.is_complex() and like.is_complex())):
        check.refuse(op, name, layout, check.describe(state))
    if state.device != like.device:
        check.refuse(op, name, f"on {like.device} like the other operands", f"a tensor on {state.device}")
    if slots is None and state.shape[0] < rows:
        check.refuse(op, name, f"of at least {rows} entries, one per row, without slots", check.describe(state))


def _step(
    op: str, backend: str | None, rows: int, tokens: int, like: Tensor, operands: dict[str, Any],
    state: Tensor | tuple[Tensor, ...], slots: Tensor | None, counts: Tensor | None, update: bool, output: bool,
):  # fmt: skip
    """Check what all steps share and compute; the state was checked before."""
    _indices(op, "slots", slots, rows, like.device)
    _indices(op, "counts", counts, rows, like.device)
    if not update and not output:
        check.refuse(op, "output", "True where update is False: nothing would be left to do", "False")
    pool = state if isinstance(state, Tensor) else state[0]
    if torch.is_grad_enabled():
        for name, x in {**operands, "state": pool}.items():
            if isinstance(x, Tensor) and x.requires_grad:
                check.refuse(op, name, "without gradient: a step overwrites its state (use torch.no_grad())", "requires_grad=True")
    if check.debugging():
        if slots is not None:
            used = slots[slots != -1]
            if bool(((slots < -1) | (slots >= pool.shape[0])).any()) or used.unique().numel() != used.numel():
                check.refuse(op, "slots", f"-1 or different entries below {pool.shape[0]}", slots.tolist())
        if counts is not None and bool(((counts < 0) | (counts > tokens)).any()):
            check.refuse(op, "counts", f"between 0 and the {tokens} tokens", counts.tolist())
    with torch.no_grad():
        return call(op, backend, **operands, state=state, slots=slots, counts=counts, update=bool(update), output=bool(output))


def _matrix_pool(op: str, head_counts: dict[str, int], q: Tensor, v: Tensor, state: Tensor, slots: Tensor | None) -> None:
    check.heads(op, head_counts)
    heads = max(count for name, count in head_counts.items() if name != "q")
    _pool(op, "state", state, (heads, q.shape[3], v.shape[3]), "H, K, V", q.shape[0], slots, q)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    read: str = "after",
    steps_per_token: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.linear_attention` (no normaliser, gain or bonus) on a pool state [P, H, K, V].

    Returns:
        o [B, T, H, V] in the dtype of v, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.linear_attention"
    _common(op, q, k, v, steps_per_token)
    check.choice(op, "read", read, ("after", "before"))
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    heads["log_decay"] = check.log_decay(op, log_decay, q, q.shape[1], q.shape[3])
    _matrix_pool(op, heads, q, v, state, slots)
    operands = dict(q=q, k=k, v=v, log_decay=log_decay, read=read, steps_per_token=steps_per_token, scale=_scale(scale, q))
    return _step(op, backend, *q.shape[:2], q, operands, state, slots, counts, update, output)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor,
    state: Tensor,
    write: Tensor | None = None,
    write_key: Tensor | None = None,
    log_decay: Tensor | None = None,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    erase_read: str = "after_decay",
    read: str = "after",
    steps_per_token: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.delta_rule`, with all its gates, on a pool state [P, H, K, V].

    Returns:
        o [B, T, H, V] in the dtype of v, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.delta_rule"
    _common(op, q, k, v, steps_per_token)
    check.choice(op, "erase_read", erase_read, ("after_decay", "before_decay"))
    check.choice(op, "read", read, ("after", "before"))
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]} | _delta_gates(op, k, v, erase, write, write_key)
    heads["log_decay"] = check.log_decay(op, log_decay, q, q.shape[1], q.shape[3])
    _matrix_pool(op, heads, q, v, state, slots)
    operands = dict(
        q=q, k=k, v=v, erase=erase, write=write, write_key=write_key, log_decay=log_decay, erase_read=erase_read, read=read,
        steps_per_token=steps_per_token, scale=_scale(scale, q),
    )  # fmt: skip
    return _step(op, backend, *q.shape[:2], q, operands, state, slots, counts, update, output)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.dplr` on a pool state [P, H, K, V].

    Returns:
        o [B, T, H, V] in the dtype of v, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.dplr"
    _common(op, q, k, v, 1)
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]} | _dplr_directions(op, q, a, b)
    heads["log_decay"] = check.log_decay(op, log_decay, q, q.shape[1], q.shape[3])
    _matrix_pool(op, heads, q, v, state, slots)
    operands = dict(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, scale=_scale(scale, q))
    return _step(op, backend, *q.shape[:2], q, operands, state, slots, counts, update, output)


def scan(
    x: Tensor,
    *,
    a: Tensor | None = None,
    log_a: Tensor | None = None,
    state: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.scan` on a pool state [P, ...].

    Returns:
        h [B, T, ...], or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.scan"
    batch, tokens = _sequence(op, "x", x, "[B, T, ...]")
    a, log_a = _decay(op, x, a, log_a)
    turned = x if a is None or not a.is_complex() else a
    _pool(op, "state", state, tuple(x.shape[2:]), "...", batch, slots, turned)
    if turned.is_complex() and not state.is_complex():
        check.refuse(op, "state", "complex where x or a is", check.describe(state))
    return _step(op, backend, batch, tokens, x, dict(x=x, a=a, log_a=log_a), state, slots, counts, update, output)


def selective_scan(
    x_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_D: Tensor | None = None,
    z_BTD: Tensor | None = None,
    *,
    state: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.selective_scan` on a pool state [P, D, N].

    Returns:
        y [B, T, D] in the dtype of x, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.selective_scan"
    batch, tokens = _selective_operands(op, x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD)
    _pool(op, "state", state, tuple(A_DN.shape), "D, N", batch, slots, x_BTD)
    operands = dict(x_BTD=x_BTD, delta_BTD=delta_BTD, A_DN=A_DN, B_BTN=B_BTN, C_BTN=C_BTN, D_D=D_D, z_BTD=z_BTD)
    return _step(op, backend, batch, tokens, x_BTD, operands, state, slots, counts, update, output)


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: str | None = None,
    *,
    state: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of `linnet.ops.short_conv` on a pool state [P, D, W-1], the last inputs, oldest first.

    Returns:
        y [B, T, D] in the dtype of x, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.short_conv"
    batch, tokens = _conv_operands(op, x_BTD, weight_DW, bias_D, activation)
    _pool(op, "state", state, (x_BTD.shape[2], weight_DW.shape[1] - 1), "D, W-1", batch, slots, x_BTD)
    operands = dict(x_BTD=x_BTD, weight_DW=weight_DW, bias_D=bias_D, activation=activation)
    return _step(op, backend, batch, tokens, x_BTD, operands, state, slots, counts, update, output)


def softmax_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor],
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    update: bool = True,
    output: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """A few tokens of causal `linnet.ops.softmax_attention` on a pool of key-value caches of a fixed size.

    Args:
        state: (k [P, S, Hk, K], v [P, S, Hv, V], length [P] int64). Entry p holds length[p] tokens in its first slots; the rest is
            room, and length + T must not exceed S. Keys and values of the new tokens are put behind the valid ones in any case;
            `update` and `counts` say how many of them `length` counts. All S slots are read, whatever the length.

    Returns:
        o [B, T, H, V] in the dtype of v, or None with output=False. The state, its slots and counts: see `linnet.ops.decode`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "decode.softmax_attention"
    check.tensor(op, "q_BTHK", q_BTHK, "[B, T, H, K]", 4)
    batch, tokens, heads, key_size = q_BTHK.shape
    if tokens < 1:
        check.refuse(op, "q_BTHK", "of at least one token", check.describe(q_BTHK))
    for name, x, shape in (("k_BTHK", k_BTHK, "[B, T, H, K]"), ("v_BTHV", v_BTHV, "[B, T, H, V]")):
        check.tensor(op, name, x, shape, 4, q_BTHK)
        check.sizes(op, name, x, {0: ("batch", batch), 1: ("time", tokens)})
        if x.shape[2] < 1 or heads % x.shape[2]:
            check.refuse(op, name, f"of a head count that divides the {heads} heads of 'q_BTHK'", f"{x.shape[2]} heads")
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", key_size)})
    check.same_dtype(op, {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV})
    if not isinstance(state, (tuple, list)) or len(state) != 3 or not all(isinstance(x, Tensor) and x.ndim for x in state):
        check.refuse(op, "state", "a tuple (k [P, S, H, K], v [P, S, H, V], length [P])", check.describe(state))
    keys, values, length = state
    room = keys.shape[1] if keys.ndim > 1 else 0
    _pool(op, "state", keys, (room, *k_BTHK.shape[2:]), "S, H, K", batch, slots, q_BTHK)
    _pool(op, "state", values, (room, *v_BTHV.shape[2:]), "S, H, V", batch, slots, q_BTHK)
    entries = keys.shape[0]
    if values.shape[0] != entries or tuple(length.shape) != (entries,) or length.dtype != torch.int64:
        check.refuse(op, "state", f"of {entries} entries with an int64 length [{entries}]", check.describe(length))
    if check.debugging() and bool((length + tokens > room).any()):
        check.refuse(op, "state", f"of room for {tokens} more tokens in its {room} slots", length.tolist())
    operands = dict(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, scale=key_size**-0.5 if scale is None else float(scale))
    return _step(op, backend, batch, tokens, q_BTHK, operands, (keys, values, length), slots, counts, update, output)


def in_place(op: str, backend: str | None, arguments: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """A call of operator `op` with a state, as the step that overwrites this state: its (output, state), None if there is no step.

    For handlers (`linnet.ops.use_handler`) of callers that own the state's memory. `arguments` are those that a handler gets.
    """
    form, state = FORMS.get(op), arguments.get("initial_state")
    if form is None or state is None or arguments["cu_seqlens"] is not None or not arguments["return_state"]:
        return None
    if any(arguments[name] != value for name, value in form.fixed.items() if name not in IRRELEVANT):
        return None
    if backend is not None and backend not in backends_of(f"decode.{op}"):
        return None
    operands = {name: arguments[name] for name in form.names}
    pool = state if op == "softmax_attention" else state[0]
    o = call(f"decode.{op}", backend, **operands, state=pool, slots=None, counts=None, update=True, output=True)
    return o, state
