"""Text from a trained model, piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np


def stream(
    checkpoint: str,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    device: Any = None,
) -> Iterator[str]:
    """Yield the prompt and its continuation as they are generated; ends with the model's end-of-document token.

    temperature 0 takes the most likely token; top_p and top_k restrict sampling as in `transformers.generate`.
    """
    import torch
    from transformers import TextIteratorStreamer, set_seed

    from linnet.training.loading import load_model
    from linnet.training.tokenization import boundary_ids, encode

    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0; got {temperature}")
    model, tokenizer = load_model(checkpoint, device)
    bos, eos, pad = boundary_ids(tokenizer)
    ids = encode(tokenizer, [prompt])[0].astype(np.int64)
    ids = ids if bos is None else np.concatenate([[bos], ids])
    if len(ids) == 0:
        raise ValueError("prompt must hold at least one token with a tokenizer that has no begin-of-document token; got none")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {"do_sample": False}
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            input_ids = torch.from_numpy(ids)[None].to(model.device)
            mask = torch.ones_like(input_ids)
            options = {"max_new_tokens": max_tokens, "eos_token_id": eos, "pad_token_id": pad, **sampling}
            model.generate(input_ids, attention_mask=mask, streamer=streamer, **options)
        except BaseException as error:  # the reader of the stream raises it
            failure.append(error)
            streamer.end()

    set_seed(seed)
    yield prompt
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    except queue.Empty:
        pass
    thread.join()
    if failure:
        raise failure[0]
