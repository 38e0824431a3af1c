"""Linnet models in lm-evaluation-harness, as the model `linnet`.

    python -m linnet.integrations.lm_eval --model linnet --model_args pretrained=FOLDER --tasks lambada_openai --batch_size 16

takes the arguments of the `lm_eval` command; from Python, importing this module registers the model.

Loading, chat templates and the loop of generation are the harness's (`HFLM`). What is done here:

- Log-likelihoods: requests are packed into one row of `batch_size` sequences (`cu_seqlens`). There is no padding, so that no
  result depends on its side or on what else is in the batch, and logits exist at the scored positions only.
- Generation: left-padded batches with their mask, which the model takes apart; a row ends at its own end-of-document token.
- Tokens: a prompt begins with the begin-of-document token, as documents do in training, and nothing is appended to it. (With a
  tokenizer that appends a token to every text, as the one of bytes does, the harness's own model would cut the
  continuation in the wrong place.)
- Length: nothing is truncated unless `max_length` is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from linnet.evals.perplexity import next_token_scores, windows
from linnet.models import LinnetConfig
from linnet.training.loading import resolve
from linnet.training.tokenization import boundary_ids, encode

Request = tuple[Any, list[int], list[int]]  # what the cache of results knows it by, context tokens, continuation tokens


@register_model("linnet")
class LinnetLM(HFLM):
    """A Linnet checkpoint, run or model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        pretrained: the folder of a run (its newest complete checkpoint) or of a checkpoint, a hub name, or a `LinnetForCausalLM`.
        tokenizer: None takes the checkpoint's; to be given with a model object.
        max_length: longest input in tokens; longer ones lose their beginning, rolling windows have this length. None: no limit.
        batch_size: requests per packed row, or prompts generated at a time.
        add_bos_token: begin every prompt with the begin-of-document token (or `prefix_token_id`). False only for models that were
            trained without it.
        Further ones: `lm_eval.models.huggingface.HFLM`.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        add_bos_token: bool = True,
        **kwargs: Any,
    ):
        if str(batch_size or 1).startswith("auto"):
            raise ValueError(f"batch_size must be a number of requests; got {batch_size!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token or None; got {max_length}")
        if isinstance(pretrained, (str, Path)):
            pretrained = str(resolve(pretrained) if Path(pretrained).is_dir() else pretrained)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(
            pretrained, backend="causal", max_length=max_length, batch_size=int(batch_size or 1), device=device, **kwargs
        )
        if not isinstance(self.config, LinnetConfig):
            raise ValueError(f"pretrained must be a Linnet model (others: --model hf); got a {self.config.model_type!r} model")
        self._bos, self._eos, _ = boundary_ids(self.tokenizer)
        if self._bos is None:
            raise ValueError(
                "tokenizer must have a begin- or end-of-document token (rolling windows start from it); got one without"
            )
        self.add_bos_token = add_bos_token

    @property
    def max_length(self) -> int:
        return self._max_length or sys.maxsize

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        return self._bos if self.custom_prefix_token_id is None else self.custom_prefix_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if (self.add_bos_token if add_special_tokens is None else add_special_tokens) and ids[:1] != [self.prefix_token_id]:
            ids = [self.prefix_token_id, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        longest = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
        return ids, mask

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether each of its tokens is the most likely one) of every request."""
        limit = self.max_length + 1
        for _, context, continuation in requests:
            if not context or not 1 <= len(continuation) < limit:
                expected = f"a context and a continuation of 1..{limit - 1} tokens"
                raise ValueError(f"every request must have {expected}; got {len(context)} and {len(continuation)}")
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # adapters are inside
        # rows of like lengths, the longest first: the largest need of memory shows at once
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        size = override_bs or self.batch_size
        for begin in tqdm(range(0, len(order), size), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods"):
            chosen = order[begin : begin + size]
            sequences = [(requests[i][1] + requests[i][2])[-limit:] for i in chosen]
            counts = [len(requests[i][2]) for i in chosen]
            with torch.autocast(self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
                nats, greedy = next_token_scores(model, sequences, counts)
            sums = [float(x.double().sum()) for x in nats.split(counts)]
            hits = [bool(x.all()) for x in greedy.split(counts)]
            for i, nat, hit in zip(chosen, sums, hits, strict=True):
                answers[i] = (-nat, hit)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of every text, each alone, in windows of `max_length` tokens; the sum over `linnet.evals.perplexity`'s windows."""
        texts = [request.args[0] for request in requests]
        pieces, owners = [], []
        for owner, ids in enumerate(encode(self.tokenizer, texts)):
            ids = [self.prefix_token_id, *ids.tolist()]
            for start, end, scored in windows(len(ids), self.max_length + 1, self.max_length):
                pieces.append((None, ids[start:scored], ids[scored:end]))
                owners.append(owner)
        totals = np.zeros(len(texts))
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[owner] += value
        for text, total in zip(texts, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals.tolist()

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        # A row that has ended must stay ended while others go on: the decoded text drops special tokens, but not what follows.
        # The empty string, as which some tokenizers decode the end of a document, is found in any text: it would stop at once.
        stop = [text for text in stop if text]
        return super()._model_generate(context, max_length, stop, **{"eos_token_id": self.eot_token_id, **options})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
