"""Long-context tasks as text: RULER (Hsieh et al. 2024, arXiv 2404.06654), passkey (Mohtashami & Jaggi 2023, 2305.16300) and
BABILong-like stories (Kuratov et al. 2024, 2406.10149).

`length` counts bytes, or tokens where a tokenizer is given. As batches they are bytes of prompt and answer, the answer is
asked; `samples` gives (prompt, answers) for a model with a tokenizer, `matched` scores what it generated. Essays and novels are
not at hand: the prose is generated from word lists of our own, so that scores are not those of the published sets.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from linnet.evals.tasks._base import Batch, Task, empty_targets, register_task, stream

NOUNS = (
    "anchor apple arrow autumn badge barrel basket beacon bell bench bishop blanket bottle bridge bucket button cabin "
    "candle canyon carpet castle cedar chapel cherry cloud compass copper coral cotton cradle crystal dagger desert diamond "
    "dragon eagle ember engine falcon feather fiddle forest fountain garden ginger glacier hammer harbor hazel helmet "
    "island ivory jacket jungle kettle ladder lantern lemon locket lumber magnet maple marble meadow mirror mountain needle "
    "oasis orchard paddle palace pebble pepper piano pillow planet pocket prairie puzzle quarry rabbit ribbon river saddle "
    "sailor shadow shelter silver spider summit sunset temple thunder timber tunnel turtle valley velvet violin walnut "
    "whistle willow window winter"
).split()
ADJECTIVES = (
    "ancient bitter brave bright broken calm careful cheerful clever cold crooked curious dark deep distant dusty eager "
    "early empty faint famous fierce gentle golden grand hidden hollow honest humble idle jolly keen little lively lonely "
    "lucky mellow mighty modest narrow noble pale patient plain proud quick quiet rapid rough round rusty sharp shiny "
    "silent simple slender small smooth sober steady strange sturdy sudden sweet tender thick tidy tiny warm weary wide "
    "wild wise young"
).split()
VERBS = "follows finds keeps leaves likes meets moves needs opens paints passes reaches remembers sees shows takes watches".split()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PEOPLE, PLACES = "Mary John Daniel Sandra".split(), "bathroom bedroom garden hallway kitchen office".split()
THINGS, MOVES = "apple football milk".split(), ("went to", "moved to", "journeyed to", "travelled to")


class Sample(NamedTuple):
    prompt: str
    answers: list[str]


def prose(rng: np.random.Generator, sentences: int) -> list[str]:
    pick = lambda words: np.array(words)[rng.integers(0, len(words), (sentences, 2))]
    a, n, v = pick(ADJECTIVES), pick(NOUNS), pick(VERBS)
    return [f"The {a[i, 0]} {n[i, 0]} {v[i, 0]} the {a[i, 1]} {n[i, 1]}." for i in range(sentences)]


def spread(rng: np.random.Generator, hay: list[str], needles: list[str]) -> str:
    """The needles in order at random places between the sentences of the hay."""
    cut = np.sort(rng.integers(0, len(hay) + 1, len(needles)))
    for place, needle in zip(cut[::-1], needles[::-1], strict=True):
        hay.insert(int(place), needle)
    return " ".join(hay)


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A subclass writes a sample with so many units of filler; the number is chosen so that prompt and answer fit."""

    length: int = 1024

    @property
    def input_size(self) -> int:
        return 256

    def write(self, rng: np.random.Generator, filler: int) -> Sample:
        raise NotImplementedError

    def fitted(self, seed: int, count: Callable[[str], int]) -> Sample:
        """The longest sample of at most `length` tokens; every size is written with the same random stream."""
        make = lambda filler: self.write(np.random.Generator(np.random.PCG64(seed)), filler)
        size = lambda sample: count(sample.prompt + " " + ", ".join(sample.answers))
        low, high = 0, 1
        if size(make(0)) > self.length:
            raise ValueError(f"task {self.name!r}: length must be at least {size(make(0))} for this sample; got {self.length}")
        while size(make(high)) <= self.length:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(make(middle)) <= self.length else (low, middle)
        return make(low)

    def samples(self, split: str, index: int, count: int, *, tokens: Callable[[str], int] | None = None) -> list[Sample]:
        """`count` samples; tokens: how many tokens a text has (None: bytes)."""
        rng = stream(type(self).__name__, self.options(), split, index, count)
        return [self.fitted(int(seed), tokens or (lambda text: len(text.encode()))) for seed in rng.integers(0, 2**62, count)]

    def generate(self, rng, size, split):
        inputs, targets = np.zeros((size, self.length), np.int64), empty_targets((size, self.length))
        for row, seed in enumerate(rng.integers(0, 2**62, size)):
            sample = self.fitted(int(seed), lambda text: len(text.encode()))
            answer = (" " + ", ".join(sample.answers)).encode()
            text = np.frombuffer(sample.prompt.encode() + answer, np.uint8)
            inputs[row, : len(text) - 1] = text[:-1]
            targets[row, len(text) - 1 - len(answer) : len(text) - 1] = text[-len(answer) :]
        return Batch(inputs, targets)


def matched(generated: str, answers: list[str], *, any_of: bool = False) -> float:
    """The share of the answers that the text contains, case ignored (RULER's string_match_all); any_of: whether one is there."""
    hits = [answer.lower() in generated.lower() for answer in answers]
    return float(any(hits)) if any_of else sum(hits) / len(hits)


def word_key(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def new_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


@register_task("ruler_single_1", haystack="noise")
@register_task("ruler_single_2")
@register_task("ruler_single_3", value="uuid")
@register_task("ruler_multikey_1", keys=4)
@register_task("ruler_multikey_2", haystack="needles")
@register_task("ruler_multikey_3", haystack="needles", key="uuid", value="uuid")
@register_task("ruler_multivalue", values=4)
@register_task("ruler_multiquery", keys=4, queries=4)
@dataclass(frozen=True, kw_only=True)
class TextNeedles(TextTask):
    """haystack: "noise" (the same sentences again and again), "prose", or "needles" (of other keys). key, value: "word"/"number"
    or "uuid". keys, values per key, and queries: numbers."""

    haystack: str = "prose"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def check(self) -> None:
        if self.haystack not in ("noise", "prose", "needles"):
            self.refuse("haystack", "'noise', 'prose' or 'needles'")
        if not 1 <= self.queries <= self.keys:
            self.refuse("queries", f"between 1 and keys = {self.keys}")

    def write(self, rng, filler):
        kind = "numbers" if self.value == "number" else "uuids"
        new_key = lambda: word_key(rng) if self.key == "word" else new_uuid(rng)
        new_value = lambda: str(rng.integers(10**6, 10**7)) if self.value == "number" else new_uuid(rng)
        sentence = lambda k, v: f"One of the special magic {kind} for {k} is: {v}."
        keys: list[str] = []
        while len(keys) < self.keys:
            keys += [key for key in [new_key()] if key not in keys]
        values = {key: [new_value() for _ in range(self.values)] for key in keys}
        needles = [sentence(key, value) for key in keys for value in values[key]]
        asked = [keys[i] for i in rng.permutation(self.keys)[: self.queries]]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        if self.haystack == "noise":
            hay = [NOISE] * filler
        elif self.haystack == "prose":
            hay = prose(rng, filler)
        else:
            hay = [sentence(k, new_value()) for k in (new_key() for _ in range(filler)) if k not in keys]
        answers = [value for key in asked for value in values[key]]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        one, context = len(answers) == 1, spread(rng, hay, needles)
        some, noun, are = ("A", kind[:-1], "is") if one else ("Some", kind, "are all")
        begin = f"{some} special magic {noun} {'is' if one else 'are'} hidden within the following text. Make sure to memorize it. "
        begin += f"I will quiz you about the {noun} afterwards.\n"
        question = f"\nWhat {are} the special magic {noun} for {query} mentioned in the provided text? "
        lead = f"The special magic {noun} for {query} mentioned in the provided text {'is' if one else 'are'}"
        return Sample(begin + context + question + lead, answers)


@register_task("ruler_variable_tracking")
@dataclass(frozen=True, kw_only=True)
class VariableTracking(TextTask):
    """VAR A = 12345, VAR B = VAR A, ... in noise: all variables with the value of the first, over `hops` assignments."""

    hops: int = 4

    def write(self, rng, filler):
        names: list[str] = []
        while len(names) < self.hops + 1:
            name = "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in rng.integers(0, 26, 5))
            names += [name] if name not in names else []
        value = rng.integers(10_000, 100_000)
        steps = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
        text = spread(rng, [NOISE] * filler, steps)
        begin = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        ask = f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: The variables are"
        return Sample(begin + text + ask, names)


@register_task("ruler_common_words", common=10, often=30, seldom=3)
@register_task("ruler_frequent_words", common=3, zipf=2.0)
@dataclass(frozen=True, kw_only=True)
class CountWords(TextTask):
    """The `common` most frequent words of a list. zipf None: these stand `often` times, every other one `seldom` times (the counts
    shrink with the length); else frequencies follow rank^-zipf."""

    length: int = 2048
    common: int = 10
    often: int = 30
    seldom: int = 3
    zipf: float | None = None

    def write(self, rng, filler):
        pool = [f"{a}{n}" for a, n in zip(rng.permutation(ADJECTIVES * 4), rng.permutation(NOUNS * 4), strict=False)]
        pool = list(dict.fromkeys(pool))
        if self.zipf is None:
            share = min(1.0, (filler + 2) / 40)  # short texts repeat less
            often, seldom = max(2, round(self.often * share)), max(1, round(self.seldom * share))
            others = pool[self.common : self.common + filler]
            words = pool[: self.common] * often + others * min(seldom, often - 1)
        else:
            count = (8 + filler) * np.arange(1.0, len(pool) + 1) ** -self.zipf / 1.7
            words = [w for w, n in zip(pool, np.maximum(np.round(count), 0).astype(int), strict=True) for _ in range(n)]
            words += pool[:1] * 3 + pool[1:2] * 2 + pool[2:3]
        text = " ".join(words[i] for i in rng.permutation(len(words)))
        begin = "Below is a list of words. Memorize the ones that appear most often.\n"
        ask = f"\nQuestion: What are the {self.common} most common words in the above list? Answer: They are"
        return Sample(begin + text + ask, pool[: self.common])


@register_task("passkey")
@dataclass(frozen=True, kw_only=True)
class Passkey(TextTask):
    """A number of five digits in repeated text."""

    def write(self, rng, filler):
        key = rng.integers(10_000, 100_000)
        text = spread(rng, [NOISE] * filler, [f"The pass key is {key}. Remember it. {key} is the pass key."])
        begin = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
        return Sample(f"{begin}{text}\nWhat is the pass key? The pass key is", [str(key)])


@register_task("stories_1", facts=1)
@register_task("stories_2", facts=2)
@register_task("stories_3", facts=3)
@dataclass(frozen=True, kw_only=True)
class Stories(TextTask):
    """People walk between rooms and carry things, among sentences that do not matter.

    facts = 1: where is a person? 2: where is a thing? 3: where was it before it came to the room where it is now?
    """

    facts: int = 1
    events: int = 12

    def check(self) -> None:
        if self.facts not in (1, 2, 3):
            self.refuse("facts", "1, 2 or 3")

    def write(self, rng, filler):
        while True:
            story, where, holder = [], {}, dict.fromkeys(THINGS)
            path: dict[str, list[str]] = {thing: [] for thing in THINGS}
            for _ in range(self.events * (1 if self.facts == 1 else 2)):
                who = PEOPLE[rng.integers(len(PEOPLE))]
                held = [thing for thing, owner in holder.items() if owner == who]
                free = [thing for thing, owner in holder.items() if owner is None]
                if self.facts > 1 and who in where and rng.random() < 0.4 and (held or free):
                    near = [x for x in free if not path[x] or path[x][-1] == where[who]]
                    if held and (rng.random() < 0.5 or not near):
                        story.append(f"{who} dropped the {held[0]}.")
                        holder[held[0]] = None
                    elif near:
                        thing = near[rng.integers(len(near))]
                        story.append(f"{who} picked up the {thing}.")
                        holder[thing] = who
                        path[thing] += [where[who]] if not path[thing] else []
                    continue
                room = PLACES[rng.integers(len(PLACES))]
                if where.get(who) == room:
                    continue
                where[who] = room
                story.append(f"{who} {MOVES[rng.integers(len(MOVES))]} the {room}.")
                for thing in held:
                    path[thing].append(room)
            if self.facts == 1:
                who = sorted(where)[rng.integers(len(where))]
                question, answer = f"Where is {who}?", where[who]
                break
            known = [thing for thing in THINGS if len(path[thing]) >= self.facts - 1]
            if known:
                thing = known[rng.integers(len(known))]
                now, question = path[thing][-1], f"Where is the {thing}?"
                answer = now
                if self.facts == 3:
                    question, answer = f"Where was the {thing} before the {now}?", path[thing][-2]
                break
        return Sample(spread(rng, prose(rng, filler), story) + f"\nQuestion: {question} Answer:", [answer])
