"""The generators: the same batch everywhere, and tasks that can be solved by who knows the rule."""

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from linnet.evals import get_task, list_tasks, register_task
from linnet.evals.tasks import Task
from linnet.evals.tasks import regression as R
from linnet.evals.tasks._base import IGNORE, divide, stream
from linnet.evals.tasks.ruler import TextTask, matched
from linnet.evals.tasks.selectivbench import LONGEST, grammar, walk


def write_files(folder: Path) -> Path:
    """Tiny data in the formats of the tasks that read the user's files; the same numbers every time."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("pos", "neg"):
            (folder / "imdb" / split / kind).mkdir(parents=True)
            for i in range(3):
                (folder / "imdb" / split / kind / f"{i}.txt").write_text(f"{kind} {split} {i} " * (i + 1))
    for name in ("train", "eval", "test"):
        lines = [f"{i % 2}.0\t{i}\t{i + 1}\tfirst {name} {i}\tsecond {i}\n" for i in range(4)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    (folder / "cifar").mkdir()
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        data = {b"data": rng.integers(0, 256, (6, 3072)).astype(np.uint8), b"labels": rng.integers(0, 10, 6).tolist()}
        (folder / "cifar" / name).write_bytes(pickle.dumps(data, protocol=2))
    return folder


_FOLDER = tempfile.TemporaryDirectory()
FILES = write_files(Path(_FOLDER.name))
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
SMALL = {
    "listops": {"low": 30, "length": 150},
    "listops_subtrees": {"low": 30, "length": 150},
    "lra_image": {"path": str(FILES / "cifar")},
    "lra_retrieval": {"path": str(FILES), "length": 64},
    "lra_text": {"path": str(FILES / "imdb"), "length": 40},
    "mqar_long": {"vocabulary": 512},
    "pathfinder_segmentation": {"length": 32, "distractors": 1},
    "pathfinder_x": {"length": 32, "distractors": 1},
    **{f"selectivbench_{x}": {"length": 40, "ambiguous": 8, "depth": 8} for x in ("gaps", "noise", "distractors", "memorization")},
}


def small(name: str, **options) -> Task:
    """The task at a size that takes no time."""
    return get_task(name, **SMALL.get(name, {}), **options)


@pytest.mark.parametrize("name", list_tasks())
def test_the_first_batch_is_the_golden_one(name):
    task = small(name)
    batch = task.batch("train", 0, 4)
    assert batch.digest() == GOLDEN.get(name), f"new batch of {name}: {batch.digest()}"
    assert batch.digest() == task.batch("train", 0, 4).digest()
    others = [task.batch(*where, 4, seed=seed).digest() for *where, seed in (("train", 1, 0), ("test", 0, 0), ("train", 0, 1))]
    assert len({batch.digest(), *others}) == 4


@pytest.mark.parametrize("name", list_tasks())
def test_sizes_are_what_the_task_says(name):
    task = small(name)
    inputs, targets, _ = task.batch("test", 0, 4)
    assert inputs.shape[:2] == targets.shape[:2] and len(inputs) == 4
    if task.inputs == "tokens":
        assert inputs.dtype == np.int64 and 0 <= inputs.min() and inputs.max() < task.input_size
    else:
        assert inputs.dtype == np.float32 and inputs.shape[2] == task.input_size and np.isfinite(inputs).all()
    if task.targets == "classes":
        asked = targets[targets != IGNORE]
        assert len(asked) and 0 <= asked.min() and asked.max() < task.output_size and 0 < task.chance < 1
        perfect = np.eye(task.output_size)[targets.clip(0)] * 9
    else:
        assert targets.shape[2] <= task.output_size and (~np.isnan(targets)).any()
        perfect = np.concatenate((np.nan_to_num(targets), np.zeros((*targets.shape[:2], task.output_size - targets.shape[2]))), 2)
    batch = task.batch("test", 0, 4)
    assert task.score(divide(task.metrics(perfect, batch))) == pytest.approx(1)
    assert task.score(divide(task.metrics(-perfect, batch))) < 0.9


def test_a_batch_does_not_depend_on_the_process():
    code = "from linnet.evals import get_task; print(get_task('mqar').batch('train', 5, 8).digest())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert other == get_task("mqar").batch("train", 5, 8).digest()


def test_bad_names_and_options_are_refused():
    with pytest.raises(ValueError, match="did you mean 'mqar'"):
        get_task("mqarr")
    with pytest.raises(ValueError, match="option must be one of .*pairs.*got 'pair'"):
        get_task("mqar", pair=3)
    with pytest.raises(ValueError, match="length must be an integer"):
        get_task("mqar", length=0)
    for name, options, expected in (
        ("mqar", {"length": 32, "pairs": 16}, "length must be"),
        ("word_problem", {"group": "q8"}, "group must be"),
        ("word_problem_z5", {"generators": "swaps"}, "generators must be"),
        ("niah_single_3", {"length": 40}, "length must be"),
        ("selectivbench_gaps", {"min_gap": 11}, "min_gap must be"),
        ("in_context_regression", {"shift": "left"}, "shift must be"),
        ("ruler_single_1", {"length": 100}, "length must be"),
    ):
        with pytest.raises(ValueError, match=expected):
            get_task(name, **options).batch("train", 0, 1)
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'dev'"):
        get_task("mqar").batch("dev", 0, 1)
    with pytest.raises(ValueError, match="must be new"):
        register_task("mqar")(type("Other", (Task,), {}))


def test_an_option_at_its_default_changes_nothing():
    assert get_task("mqar", spread=0.01).batch("train", 0, 4).digest() == get_task("mqar").batch("train", 0, 4).digest()


def test_parity_and_navigation_count():
    x, y, _ = get_task("parity").batch("test", 0, 200)
    assert ((x - 1).clip(0).sum(1) % 2 + 1 == y.max(1)).all() and ((x > 0).sum(1) >= 2).all()
    x, y, _ = get_task("cycle_navigation").batch("test", 0, 200)
    assert (np.array([0, 0, 1, -1])[x].sum(1) % 5 + 1 == y.max(1)).all()
    longer = get_task("parity").at(length=80)
    assert ((longer.batch("test", 0, 200).inputs > 0).sum(1) >= 39).all()


def test_word_problems_are_prefix_products():
    task = get_task("word_problem_s5", generators="swaps", spacing=3, length=10)
    from linnet.evals.tasks.state_tracking import group

    table, elements = group("s5")
    x, y, _ = task.batch("test", 0, 5)
    for row, target in zip(x, y, strict=True):
        state = np.arange(5)
        for i in range(10):
            step = np.array(elements[row[1 + 3 * i]])
            assert (step != np.arange(5)).sum() in (0, 2)
            state = state[step]
            assert elements[target[3 + 3 * i]] == tuple(state)
    assert (y != IGNORE).sum() == 50


def test_the_last_value_of_a_key_counts():
    x, y, info = get_task("mqar_forgetting").batch("test", 0, 100)
    for row, target, updated in zip(x, y, info["updated"], strict=True):
        memory, times = {}, {}
        for k, v in zip(row[:24:2].tolist(), row[1:24:2].tolist(), strict=True):
            memory[k], times[k] = v, times.get(k, 0) + 1
        for t in np.flatnonzero(target != IGNORE):
            assert target[t] == memory[row[t]] and updated[t] == (times[row[t]] == 2)
        assert updated.sum() == 4


def test_compositional_keys_need_both_parts():
    x, y, _ = get_task("mqar_compositional").batch("test", 0, 50)
    for row, target in zip(x, y, strict=True):
        memory = {(a, b): v for a, b, v in row[:27].reshape(9, 3).tolist()}
        assert len(memory) == 9 and len({a for a, _ in memory}) == len({b for _, b in memory}) == 3
        asked = np.flatnonzero(target != IGNORE)
        assert len(asked) == 9 and all(memory[row[t - 1], row[t]] == target[t] for t in asked)


def test_a_stack_gives_the_last_value_back():
    x, y, _ = get_task("stack", stacks=5).batch("test", 0, 20)
    for row, target in zip(x.reshape(20, -1, 3).tolist(), y.reshape(20, -1, 3).tolist(), strict=True):
        stacks: dict[int, list[int]] = {}
        for (op, s, v), (_, asked, _) in zip(row, target, strict=True):
            if op == 0:
                stacks.setdefault(s, []).append(v)
                assert asked == IGNORE
            else:
                assert stacks[s].pop() == v == asked


@pytest.mark.parametrize("name", ["mad_in_context_recall", "mad_noisy_recall"])
def test_recall_asks_for_what_was_shown(name):
    task = get_task(name)
    x, y, _ = task.batch("test", 0, 20)
    for row, target in zip(x, y, strict=True):
        memory: dict[int, int] = {}
        for t in range(0, len(row), 2):
            key, value = row[t], row[t + 1]
            assert target[t] == (memory[key] if key in memory else IGNORE)
            if key < 8:
                memory[key] = value
    assert (task.batch("train", 0, 4).targets != IGNORE).all()


def test_fuzzy_recall_asks_after_whole_keys():
    x, y, _ = get_task("mad_fuzzy_recall").batch("test", 0, 20)
    for row, target in zip(x, y, strict=True):
        tokens = row[row != 16].tolist() + [int(x) for x in target[-1:] if x != IGNORE]
        memory, i, asked = {}, 0, 0
        while i + 3 < len(tokens):
            key, i = tuple(tokens[i : i + 3]), i + 3
            value = []
            while i < len(tokens) and tokens[i] >= 8:
                value.append(tokens[i])
                i += 1
            asked += len(value) if key in memory else 0
            assert memory.setdefault(key, value) == value
        assert (target != IGNORE).sum() == asked


def test_the_walk_of_selectivbench_is_that_of_rejection():
    """Strings longer than 200 symbols are thrown away: the lengths of the rest against simulation."""
    g = grammar(20, 20, 21, 0)
    rng, chains, lengths = stream("rejection"), 20_000, []
    state = g.start[rng.integers(0, 4, chains)]
    for count in range(2, LONGEST + 1):  # all chains at once, until they end or are too long
        after = g.successor[state]
        state = np.take_along_axis(after, np.where(after >= 0, rng.random(after.shape), -1).argmax(1)[:, None], 1)[:, 0]
        lengths += [count] * int((state == 0).sum())
        state = state[state != 0]
    states = walk(stream("walk"), g, 200, 2000)
    ends = [np.diff(np.flatnonzero(row == 0), prepend=-1) for row in states]
    ours = np.concatenate([x[:5] for x in ends])  # the first ones, so that long strings are not cut off
    assert (
        ours.max() <= LONGEST
        and abs(ours.mean() - np.mean(lengths)) < 5 * np.std(lengths) * (1 / len(lengths) + 1 / len(ours)) ** 0.5
    )


def test_selectivbench_scores_the_gap_with_its_element():
    task = get_task("selectivbench_noise", ambiguous=4, depth=4, length=12)
    batch = task.batch("test", 0, 6)
    output = 0.1 * np.eye(task.output_size)[(batch.targets.clip(0) + 1) % task.output_size]
    last = np.diff(batch.info["element"], axis=1, append=-2) != 0
    output[last] = 9 * np.eye(task.output_size)[batch.targets[last].clip(0)]  # right once per element, in its last step
    assert divide(task.metrics(output, batch))["accuracy"] == 1
    wrong = get_task("selectivbench_distractors", ambiguous=4, depth=4, length=30, quiet=5).batch("test", 0, 6)
    assert (wrong.inputs.any(-1).sum() > 6 * 30) and (wrong.info["element"].max(1) == 29).all()


def test_needles_are_found_by_reading():
    for name, options in (("niah_multikey_1", {}), ("niah_multivalue", {"value_tokens": 2}), ("niah_multiquery", {})):
        task = get_task(name, **options)
        m = task.value_tokens
        x, y, _ = task.batch("test", 0, 30)
        for row, target in zip(x.tolist(), y.tolist(), strict=True):
            memory: dict[int, list[int]] = {}
            for i in [i for i, token in enumerate(row) if token == 0]:
                memory.setdefault(row[i + 1], []).extend(row[i + 2 : i + 2 + m])
            asked = [i for i, token in enumerate(row) if token == 1]
            assert len(asked) == task.queries and sum(t != IGNORE for t in target) == task.queries * task.values * m
            for i in asked:
                assert target[i + 1 : i + 1 + task.values * m] == memory[row[i + 1]]


@pytest.mark.parametrize("name", [name for name in list_tasks() if isinstance(get_task(name), TextTask)])
def test_texts_fit_and_hold_their_answers(name):
    task = get_task(name)
    for prompt, answers in task.samples("test", 0, 3):
        assert task.length - 300 < len(prompt) + len(", ".join(answers)) + 1 <= task.length
        assert all(answer in prompt for answer in answers) and matched(" ".join(answers), answers) == 1
    words = task.samples("test", 0, 1, tokens=lambda text: len(text.split()) * 3)[0]
    assert len(words.prompt.split()) * 3 <= task.length and matched("nothing", ["a7", "nothing"]) == 0.5
    inputs, targets, _ = task.batch("test", 0, 2)
    answer = bytes(targets[0][targets[0] != IGNORE].astype(np.uint8).tolist()).decode()
    assert answer.strip() and answer.strip() in task.batch("test", 0, 2).inputs[0].astype(np.uint8).tobytes().decode() + answer


def test_pathfinder_labels_are_balanced():
    labels = np.concatenate([get_task("pathfinder").batch("train", i, 50).targets[:, -1] for i in range(4)])
    assert abs(labels.mean() - 0.5) < 0.12
    image = get_task("pathfinder").batch("train", 0, 4).inputs
    assert 0.05 < image.mean() < 0.5 and image.max() == 1


def test_ridge_is_best_where_there_is_noise():
    task = get_task("in_context_regression", noise=0.5, length=12)
    x, y = task.examples(stream("noise"), 4000)
    bayes = R.curve(lambda x, y: R.least_squares(x, y, 0.25), x, y)[1:]
    for fit in (R.least_squares, lambda x, y: R.gradient_descent(x, y, 3), lambda x, y: R.newton(x, y, 3)):
        assert (R.curve(fit, x, y)[1:] > bayes - 0.01).all()
    variance = R.posterior_variance(x[:, :8], x[:, 8], 0.5)
    error = np.square(np.einsum("bd,bd->b", R.least_squares(x[:, :8], y[:, :8], 0.25), x[:, 8]) - y[:, 8])
    assert error.mean() == pytest.approx(variance.mean(), rel=0.1)


def test_a_csv_file_is_split_in_the_order_of_time(tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("date,a,b\n" + "".join(f"2020-{i},{i},{-i}\n" for i in range(500)))
    task = get_task("forecasting", path=str(path), length=20, horizon=5)
    latest = {split: task.batch(split, 0, 64).inputs[:, :20, 0].max() for split in ("train", "validation", "test")}
    assert latest["train"] < latest["validation"] < latest["test"]
    batch = task.batch("test", 0, 16)
    line = batch.inputs[:, 19:20, 0] + np.arange(1, 6) * (batch.inputs[:, 19:20, 0] - batch.inputs[:, 18:19, 0])
    output = np.concatenate((np.zeros((16, 20)), line), 1)[..., None]
    measured = divide(task.metrics(output, batch))
    assert measured["mse"] < 1e-6 < 1e-4 < measured["mse_repeat"]
    with pytest.raises(ValueError, match="must hold at least length"):
        get_task("forecasting", path=str(path), length=90, horizon=60).batch("validation", 0, 1)


def test_files_of_long_range_arena(tmp_path):
    x, y, _ = small("lra_text").batch("test", 0, 40)
    for row, target in zip(x, y, strict=True):
        text = bytes((row[row > 0] - 1).astype(np.uint8)).decode()
        assert text.startswith(("neg test", "pos test")) and (target != IGNORE).sum() == 1
        assert target[len(text) - 1] == text.startswith("pos")
    seen = {split: {row.tobytes() for row in small("lra_text").batch(split, 0, 60).inputs} for split in ("train", "validation")}
    assert len(seen["train"]) == 5 and len(seen["validation"]) == 1 and not seen["train"] & seen["validation"]
    x, y, _ = small("lra_retrieval").batch("validation", 0, 20)
    for row, target in zip(x, y, strict=True):
        middle = int(np.flatnonzero(row == 257)[0])
        first, second = (bytes((part[part > 0] - 1).astype(np.uint8)).decode() for part in (row[:middle], row[middle + 1 :]))
        assert first.startswith("first eval") and target.max() == int(first[-1]) % 2 and second.startswith("second")
    data = pickle.loads((FILES / "cifar" / "test_batch").read_bytes())
    grey = (data[b"data"].reshape(6, 3, 1024).transpose(0, 2, 1) @ np.array([0.299, 0.587, 0.114])) / 127.5 - 1
    x, y, _ = small("lra_image").batch("test", 0, 30)
    for image, target in zip(x[..., 0], y, strict=True):
        which = np.abs(grey - image).max(1).argmin()
        assert np.abs(grey[which] - image).max() < 1e-5 and target[-1] == data[b"labels"][which]

    (tmp_path / "train.csv").write_text('review,sentiment\n"good, ""very""",positive\nbad,negative\n')
    (tmp_path / "test.csv").write_text("label,text\n0,awful\n1,fine\n")
    x, y, _ = get_task("lra_text", path=str(tmp_path), length=16).batch("test", 0, 20)
    assert {(bytes((r[r > 0] - 1).astype(np.uint8)), t.max()) for r, t in zip(x, y, strict=True)} == {(b"awful", 0), (b"fine", 1)}
    image = pytest.importorskip("PIL.Image")
    for folder, colour in ((tmp_path / "png" / s / n, c) for s in ("train", "test") for n, c in (("cat", 0), ("dog", 255))):
        folder.mkdir(parents=True)
        for k in range(2):
            image.new("RGB", (32, 32), (colour,) * 3).save(folder / f"{k}.png")
    x, y, _ = get_task("lra_image", path=str(tmp_path / "png")).batch("test", 0, 20)
    assert np.allclose(x[:, 0, 0], 2 * y[:, -1] - 1, atol=1e-5) and set(y[:, -1]) == {0, 1}


def test_files_that_are_not_there_are_refused(tmp_path):
    for name, expected in (
        ("lra_text", "IMDb folder"),
        ("lra_retrieval", "new_aan_pairs.train.tsv"),
        ("lra_image", "data_batch_1"),
    ):
        for path in ("", str(tmp_path / "none"), str(tmp_path)):
            with pytest.raises(ValueError, match=f"path must be .*{expected}"):
                get_task(name, path=path).batch("train", 0, 2)
    (tmp_path / "train.csv").write_text("text,label\nx,7\n")
    with pytest.raises(ValueError, match="columns text, label"):
        get_task("lra_text", path=str(tmp_path)).batch("train", 0, 2)
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Path("x")}))
    with pytest.raises(ValueError, match="arrays and lists only"):
        get_task("lra_image", path=str(tmp_path)).batch("test", 0, 2)


def test_text_and_recall_share_a_batch(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(2000)))
    task = get_task("text_recall", path=str(tmp_path / "text.txt"), length=64, pairs=8)
    x, y, info = task.batch("test", 0, 10)
    assert info["part"].tolist() == [0] * 5 + [1] * 5 and (y[:5, :-1] == x[:5, 1:]).all() and (x[:5] < 256).all()
    memory = [dict(zip(row[:16:2].tolist(), row[1:16:2].tolist(), strict=True)) for row in x[5:]]
    assert all(y[5 + i, t] == memory[i][x[5 + i, t]] for i, t in zip(*np.nonzero(y[5:] != IGNORE), strict=True))
    output = np.zeros((10, 64, task.output_size))
    measured = divide(task.metrics(output, task.batch("test", 0, 10)))
    assert measured["bits_per_byte"] == pytest.approx(np.log2(task.output_size)) and measured["accuracy"] == 0
    with pytest.raises(ValueError, match="digest must be"):
        get_task("text_recall", path=str(tmp_path / "text.txt"), digest="0").batch("train", 0, 2)
