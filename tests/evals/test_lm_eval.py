"""lm-evaluation-harness on Linnet models: same numbers as the model alone. Skipped where lm_eval is not installed."""

import json
import math
import random
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from linnet.evals.perplexity import bits_per_byte  # noqa: E402
from linnet.integrations.lm_eval import LinnetLM  # noqa: E402
from linnet.mixers import list_mixers  # noqa: E402
from linnet.models import LinnetConfig, LinnetForCausalLM  # noqa: E402
from linnet.training.tokenization import build_tokenizer  # noqa: E402

LAYERS = ["gated_deltanet + attention", "mamba2", "rwkv7", "mlstm + attention(window=4)"]
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " a very long way up, and so is everything in it"),
    ("", "no context"),
    ("One, two, three, four, five, six, seven, eight, nine, ten, " * 3, "eleven"),
    ("é", "ü"),
    ("trailing space ", "word"),
    ("a", "b"),
    ("A question? Answer:", " yes"),
    ("A question? Answer:", " no"),
]
TEXTS = ["short", "a longer document, with é in it: " * 6, "x", "two  words\n"]


def model_of(layers, **options):
    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=259, d_model=32, heads=2, layers=layers, **options)).eval()
    for x in model.parameters():  # far from uniform: mistakes must show
        x.data += 0.1 * torch.randn_like(x)
    return model


def adapter(model, **options):
    return LinnetLM(model, tokenizer=build_tokenizer("bytes"), **options)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def bytes_of(text):
    return [b + 3 for b in text.encode()]


def direct(model, context, continuation, mask_side=None):
    """ln p and greediness from one forward of begin + context + continuation alone, or beside a longer row, padded."""
    spaces = context[len(context.rstrip()) :]  # the harness counts them to the continuation
    given, wanted = [1, *bytes_of(context.rstrip())], bytes_of(spaces + continuation)
    ids = torch.tensor([given + wanted])
    if mask_side is None:
        logits = model(ids).logits[0]
    else:
        length = ids.shape[1] + 13
        rows = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(1))
        mask = torch.zeros(2, length, dtype=torch.int64)
        place = slice(13, None) if mask_side == "left" else slice(0, ids.shape[1])
        rows[0, place], mask[0, place], mask[1] = ids[0], 1, 1
        logits = model(rows, attention_mask=mask).logits[0, place]
    logp = logits[len(given) - 1 : -1].double().log_softmax(-1)
    target = torch.tensor(wanted)
    return float(logp[range(len(wanted)), target].sum()), bool((logp.argmax(-1) == target).all())


@pytest.mark.parametrize(
    ("layers", "dtype", "atol"),
    [(layers, torch.float32, 1e-5) for layers in LAYERS]
    + [pytest.param(name, torch.float64, 1e-9, marks=pytest.mark.slow) for name in list_mixers()],
)
@torch.no_grad()
def test_log_likelihoods_depend_on_nothing_but_the_request(layers, dtype, atol):
    """Batch size, order and neighbours do not count; a padded forward on either side gives the same."""
    model = model_of(layers).to(dtype)
    expected = [direct(model, *pair) for pair in PAIRS]
    for side in ("left", "right"):
        for pair, (value, _) in zip(PAIRS, expected, strict=True):
            assert direct(model, *pair, mask_side=side)[0] == pytest.approx(value, abs=atol)
    for batch_size in (1, 3, 8):
        order = list(range(len(PAIRS)))
        random.Random(batch_size).shuffle(order)
        got = adapter(model, batch_size=batch_size).loglikelihood(
            instances("loglikelihood", [PAIRS[i] for i in order]), disable_tqdm=True
        )
        for i, (value, greedy) in zip(order, got, strict=True):
            assert value == pytest.approx(expected[i][0], abs=atol), PAIRS[i]
            assert greedy == expected[i][1]


@torch.no_grad()
def test_the_harness_gives_the_same_where_its_tokens_are_the_same():
    """Its own model for transformers (right padding, no mask), a tokenizer that adds nothing, prompts without a begin token."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = model_of(LAYERS[0]), build_tokenizer("bpe:259", TEXTS)
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=4, max_length=24)
    ours = LinnetLM(model, tokenizer=tokenizer, batch_size=4, max_length=24, add_bos_token=False)
    pairs = instances("loglikelihood", [pair for pair in PAIRS if len(pair[1]) < 12])
    expected, got = theirs.loglikelihood(pairs, disable_tqdm=True), ours.loglikelihood(pairs, disable_tqdm=True)
    assert [hit for _, hit in got] == [hit for _, hit in expected]
    assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-5)
    texts = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6
    )


@torch.no_grad()
def test_greedy_continuations_are_recognised():
    model = model_of(LAYERS[0])
    ids = model.generate(torch.tensor([[1, *bytes_of("abc")]]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 4:]
    context, good = [1, *bytes_of("abc")], ids.tolist()
    bad = [*good[:-1], 3 + (good[-1] - 2) % 256]
    lm = adapter(model, batch_size=2)
    hits = lm._loglikelihood_tokens([(None, context, good), (None, context, bad)], disable_tqdm=True)
    assert [hit for _, hit in hits] == [True, False]


@pytest.mark.parametrize("max_length", [None, 8, 33])
def test_rolling_is_the_perplexity_of_linnet(max_length):
    model = model_of(LAYERS[0])
    context = 1000 if max_length is None else max_length
    expected = [
        -bits_per_byte(model, build_tokenizer("bytes"), [text], context=context + 1, stride=context)["bits"] * math.log(2)
        for text in TEXTS
    ]
    for batch_size in (1, 8):
        lm = adapter(model, batch_size=batch_size, max_length=max_length)
        got = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True)
        assert got == pytest.approx(expected, rel=1e-5)


def test_rolling_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from linnet.evals.perplexity import windows

    for tokens in (1, 3, 4, 5, 8, 11):
        ids = [99, *range(tokens)]
        for length in (1, 2, 4, 7):
            theirs = get_rolling_token_windows(list(range(tokens)), 99, length, 1)
            ours = [(ids[a:c], ids[c:b]) for a, b, c in windows(tokens + 1, length + 1, length)]
            assert ours == [tuple(map(list, make_disjoint_window(pair))) for pair in theirs]


@torch.no_grad()
def test_max_length_takes_the_beginning_away_and_no_limit_takes_nothing():
    model = model_of(LAYERS[0])
    pair = ("0123456789" * 300, "abc")  # 3 000 tokens: more than the harness's default of 2 048
    request = instances("loglikelihood", [pair])
    assert adapter(model).loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(direct(model, *pair)[0], abs=1e-4)
    ids = torch.tensor([bytes_of(pair[0] + pair[1])[-17:]])
    logp = model(ids).logits[0, :-1].log_softmax(-1)
    expected = float(logp[range(13, 16), ids[0, 14:]].sum())
    assert adapter(model, max_length=16).loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="continuation of 1..2 tokens"):
        adapter(model, max_length=2).loglikelihood(request, disable_tqdm=True)


@pytest.mark.parametrize("layers", LAYERS)
def test_generation_in_a_batch_is_generation_alone(layers):
    model, tokenizer = model_of(layers), build_tokenizer("bytes")
    prompts = [context for context, _ in PAIRS if context]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(torch.tensor([[1, *bytes_of(p)]]), eos_token_id=1, **options)[0] for p in prompts]
    free = [ids[1 + len(bytes_of(p)) :].tolist() for p, ids in zip(prompts, alone, strict=True)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in free]
    for until in ([], [texts[0][2:4]], ["", texts[0][2], texts[1][1]]):
        expected = texts
        for stop in filter(None, until):
            expected = [text.split(stop)[0] for text in expected]
        assert until == [] or expected != texts
        for batch_size in (1, 4, 8):
            requests = instances("generate_until", [(p, {"until": until, "max_gen_toks": 12}) for p in prompts])
            assert adapter(model, batch_size=batch_size).generate_until(requests, disable_tqdm=True) == expected


@torch.no_grad()
def test_a_row_that_has_ended_stays_ended():
    """Special tokens are not decoded, and what a row that has ended would say while its neighbour goes on must not show either."""
    model = model_of(LAYERS[0], tie_embeddings=False)
    prompts = ["abc", "a much longer prompt, of another kind"]
    ids = torch.tensor([[1, *bytes_of(prompts[0])]])
    free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    third = free[2]
    assert third not in free[:2] and 1 not in free
    model.lm_head.weight[[1, third]] = model.lm_head.weight[[third, 1]]  # now the third token is the end of the document
    lm = adapter(model, batch_size=2)
    long = model.generate(torch.tensor([[1, *bytes_of(prompts[1])]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, -8:]
    assert 1 not in long
    requests = instances("generate_until", [(p, {"until": [], "max_gen_toks": 8}) for p in prompts])
    expected = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in (free[:2], long)]
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_batches_are_padded_on_the_asked_side():
    lm = adapter(model_of("gla"))
    for side, first in (("left", [0, 0, 1, 100]), ("right", [1, 100, 0, 0])):
        ids, mask = lm.tok_batch_encode(["a", "abc"], padding_side=side)
        assert ids.tolist() == [first, [1, 100, 101, 102]] and mask.tolist() == [[int(i > 0) for i in first], [1] * 4]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
"""
CHOICE = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
CHOICE += 'target_delimiter: ""\nmetric_list: [{metric: acc}]\n'
ROLLING = (
    'doc_to_text: ""\ndoc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}, '
    "{metric: byte_perplexity}, {metric: bits_per_byte}]\n"
)
FREE = (
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)


@pytest.fixture
def offline(tmp_path):
    """A checkpoint of a trained run's form and three tasks over a file of four lines."""
    rows = [{"question": f"{a} plus {b} is", "choices": [" 1", f" {a + b}"], "answer": 1} for a, b in [(2, 3), (4, 4), (7, 12)]]
    rows.append({"question": "a line of its own, longer than all the others", "choices": [" yes", " no"], "answer": 0})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, kind, body in [
        ("sums", "multiple_choice", CHOICE),
        ("lines", "loglikelihood_rolling", ROLLING),
        ("free", "generate_until", FREE),
    ]:
        (tasks / f"{name}.yaml").write_text(
            TASK.format(name=f"linnet_{name}", data=data, cache=tmp_path / "cache", kind=kind) + body
        )
    model = model_of(LAYERS[0])
    model.save_pretrained(tmp_path / "model")
    build_tokenizer("bytes").save_pretrained(tmp_path / "model")
    return tmp_path, rows, model


def test_an_offline_task_from_a_checkpoint(offline, monkeypatch):
    folder, rows, model = offline
    connections = []

    def refuse(self, address):
        connections.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = {}
    for batch_size in (1, 8):
        results[batch_size] = simple_evaluate(
            model="linnet",
            model_args={"pretrained": str(folder / "model")},
            tasks=["linnet_sums", "linnet_lines", "linnet_free"],
            task_manager=manager,
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )["results"]
    with torch.no_grad():
        right = [max(range(2), key=lambda i: direct(model, row["question"], row["choices"][i])[0]) == row["answer"] for row in rows]
    own = bits_per_byte(model, build_tokenizer("bytes"), [row["question"] for row in rows], context=4096)
    for result in results.values():
        assert result["linnet_sums"]["acc,none"] == sum(right) / len(right)
        for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
            assert result["linnet_lines"][f"{name},none"] == pytest.approx(own[name], rel=1e-5)
    assert results[1]["linnet_free"]["exact_match,none"] == results[8]["linnet_free"]["exact_match,none"]
    assert connections == []


@pytest.mark.slow
def test_the_command(offline):
    folder, _, _ = offline
    command = [sys.executable, "-m", "linnet.integrations.lm_eval", "--model", "linnet"]
    command += ["--model_args", f"pretrained={folder / 'model'}", "--tasks", "linnet_sums", "--include_path", str(folder / "tasks")]
    done = subprocess.run([*command, "--batch_size", "4", "--device", "cpu"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "linnet_sums" in done.stdout and "acc" in done.stdout


def test_registered_and_refusals():
    assert get_model("linnet") is LinnetLM
    model = model_of("gla")
    with pytest.raises(ValueError, match="batch_size must be a number"):
        adapter(model, batch_size="auto")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        adapter(model, max_length=0)
    tokenizer = build_tokenizer("bytes")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have a begin- or end-of-document token"):
        LinnetLM(model, tokenizer=tokenizer)


def test_importing_linnet_does_not_import_the_harness():
    code = "import sys, linnet, linnet.evals, linnet.training, linnet.integrations; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
