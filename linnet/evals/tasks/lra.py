"""ListOps and Pathfinder of Tay et al., "Long Range Arena", 2020 (arXiv 2011.04006), generated; a byte classifier's data from disk.

ListOps follows the published generator (the shape of the trees, the values, the range of lengths). Pathfinder is a generator of
our own after the published description (Linsley et al. 2018): the images are not those of the data set, accuracies not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linnet.evals.tasks._base import Batch, Task, empty_targets, register_task

MIN, MAX, MED, SM, CLOSE, PAD = 10, 11, 12, 13, 14, 15  # digits are themselves
ROOTS = 2048  # trees that are drawn at once


def trees(rng: np.random.Generator, low: int, high: int, *, depth: int, arguments: int, branch: float = 0.25):
    """Trees of low < length < high tokens: (tokens [n, high], values [n] of the roots, of the tree that ends at a token or -1).

    A node above `depth` has 2 .. `arguments` children with probability `branch` (the root always), else it is a digit. A tree
    is as long as its digits and twice its inner nodes: "[OP", arguments, "]".
    """
    levels, parent, inner = [], np.arange(ROOTS), np.ones(ROOTS, bool)
    for level in range(depth):
        if level:
            inner = rng.random(len(parent)) < branch if level < depth - 1 else np.zeros(len(parent), bool)
        count = np.where(inner, rng.integers(2, arguments + 1, len(parent)), 0)
        levels.append([parent, inner, count, rng.integers(MIN, SM + 1, len(parent)), rng.integers(0, 10, len(parent))])
        parent = np.repeat(np.arange(len(parent)), count)
    below = None  # (lengths, values) of the level below, from the leaves up
    for level in reversed(levels):
        _, inner, count, operator, value = level
        length = np.ones(len(inner), np.int64)
        if inner.any():
            length[inner], value[inner] = _reduce(operator[inner], count[inner], *below)
        level.append(length)
        below = (length, value)
    length0 = levels[0][5]
    keep = (length0 > low) & (length0 < high)
    tokens = np.full((int(keep.sum()), high), PAD)
    ends = np.full(tokens.shape, -1)
    row, start = np.cumsum(keep) - 1, np.zeros(ROOTS, np.int64)
    for parent, inner, _, operator, value, length in levels:
        if parent is not levels[0][0]:
            size = np.concatenate(([0], np.cumsum(length)[:-1]))
            first = np.searchsorted(parent, parent)  # the eldest of the same parent; parents stand in order
            start = start[parent] + 1 + size - size[first]
            keep, row = keep[parent], row[parent]
        r, s = row[keep], start[keep]
        tokens[r, s] = np.where(inner, operator, value)[keep]
        i = keep & inner
        tokens[row[i], start[i] + length[i] - 1] = CLOSE
        ends[row[i], start[i] + length[i] - 1] = value[i]
    return tokens, levels[0][4][(length0 > low) & (length0 < high)], ends


def _reduce(operator: np.ndarray, count: np.ndarray, length: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and values of inner nodes from those of all their children, which stand in order."""
    first = np.cumsum(count) - count
    total = np.add.reduceat(length, first) + 2
    group = np.repeat(np.arange(len(count)), count)
    ordered = value[np.lexsort((value, group))]
    median = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
    low, high = ordered[first], ordered[first + count - 1]
    return total, np.choose(operator - MIN, (low, high, median, np.add.reduceat(value, first) % 10))


@register_task("listops")
@register_task("listops_small", low=31, length=96, depth=5, arguments=5)
@register_task("listops_subtrees", low=499, length=2000, subtrees=True)
@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """[MAX 2 9 [MIN 4 7 ] 0 ] and so on, low < tokens < length; the value 0 .. 9 is asked at the last bracket.

    subtrees: the value of every sub-tree, at its bracket (Gupta et al. 2022, arXiv 2212.00768). Ids: digits, MIN, MAX, MED, SM,
    "]", padding. MED is the integer part of the median, SM the sum modulo 10.
    """

    length: int = 2000
    low: int = 500
    depth: int = 11
    arguments: int = 10
    subtrees: bool = False

    def check(self) -> None:
        if not 0 <= self.low < self.length - 1:
            self.refuse("low", f"between 0 and length - 2 = {self.length - 2}")

    @property
    def input_size(self) -> int:
        return PAD + 1

    @property
    def output_size(self) -> int:
        return 10

    def generate(self, rng, size, split):
        parts, count = [], 0
        while count < size:
            parts.append(trees(rng, self.low, self.length, depth=self.depth, arguments=self.arguments))
            count += len(parts[-1][0])
        inputs, value, ends = (np.concatenate(x)[:size] for x in zip(*parts, strict=True))
        targets = np.where(ends >= 0, ends, empty_targets(inputs.shape))
        if not self.subtrees:
            last = (inputs != PAD).sum(1) - 1
            targets = empty_targets(inputs.shape)
            targets[np.arange(size), last] = value
        return Batch(inputs, targets)


# ---- pathfinder ----------------------------------------------------------------------------------------------------------


@register_task("pathfinder")
@register_task("pathfinder_x", length=128, contour=14, paddle=6.0, gap=3.0, marker=3.0, thickness=1.5, distractors=12)
@register_task("pathfinder_segmentation", length=128, contour=14, paddle=6.0, gap=3.0, marker=3.0, thickness=1.5, segmentation=True)
@dataclass(frozen=True, kw_only=True)
class Pathfinder(Task):
    """A `length` x `length` image, row by row: two dashed snakes among distractors, two discs at ends of snakes. Are they ends of
    the same one? Asked at the last pixel; segmentation: at every pixel, 0 background, 1 other, 2 on the snake that bears a disc.

    contour: paddles of a snake. paddle, gap, thickness, marker (radius): pixels. distractors: short snakes (contour / 3). bend:
    the standard deviation of the turn between paddles, radians.
    """

    length: int = 32
    contour: int = 14
    paddle: float = 2.0
    gap: float = 1.0
    marker: float = 1.5
    thickness: float = 0.6
    distractors: int = 5
    bend: float = 0.35
    segmentation: bool = False
    inputs = "vectors"

    @property
    def input_size(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        return 3 if self.segmentation else 2

    def generate(self, rng, size, split):
        n = self.length
        image, own = np.zeros((size, n, n), np.float32), np.zeros((size, n, n), bool)
        tips = []
        for snake in range(2 + self.distractors):
            paddles = self.contour if snake < 2 else max(2, self.contour // 3)
            points = self.snake(rng, image, paddles)
            begin, end = points[:, :-1], points[:, 1:]
            shrink = (end - begin) * (self.gap / 2 / (self.paddle + self.gap))
            ink = draw(begin + shrink, end - shrink, n, self.thickness)
            image = np.maximum(image, ink)
            if snake == 0:
                own = ink > 0.25
            if snake < 2:
                tips.append((points[:, 0], points[:, -1]))
        label = rng.integers(0, 2, size)
        other = np.where(label[:, None] == 1, tips[0][1], tips[1][1])
        for point in (tips[0][0], other):
            image = np.maximum(image, draw(point[:, None], point[:, None] + 1e-3, n, self.marker))
        inputs = image.reshape(size, n * n, 1)
        targets = empty_targets(inputs.shape[:2])
        targets[:, -1] = label
        if self.segmentation:
            targets = np.where(own, 2, image > 0.25).astype(np.int64).reshape(size, -1)
        return Batch(inputs, targets)

    def snake(self, rng: np.random.Generator, image: np.ndarray, paddles: int) -> np.ndarray:
        """Corner points [B, paddles + 1, 2] of one snake per image: at every step the candidate on the free-est ground, near the
        direction so far, of eight; the start is the free-est of 32 places and directions."""
        size, n, step = len(image), self.length, self.paddle + self.gap
        row = np.arange(size)[:, None]
        point, angle = rng.uniform(0.15 * n, 0.85 * n, (size, 32, 2)), rng.uniform(0, 2 * np.pi, (size, 32))
        best = self.cost(image, point, angle, 4 * step).argmin(1)
        point, angle = point[row[:, 0], best], angle[row[:, 0], best]
        points = [point]
        for _ in range(paddles):
            turn = angle[:, None] + self.bend * rng.standard_normal((size, 8)) * np.array([0.3, 1, 1, 1, 1, 2, 3, 5])
            place = np.repeat(point[:, None], 8, 1)
            best = (self.cost(image, place, turn, step) + 0.02 * np.abs(turn - angle[:, None])).argmin(1)
            angle = turn[row[:, 0], best]
            point = np.clip(point + step * np.stack((np.sin(angle), np.cos(angle)), -1), 1, n - 2)
            points.append(point)
        return np.stack(points, 1)

    def cost(self, image: np.ndarray, point: np.ndarray, angle: np.ndarray, reach: float) -> np.ndarray:
        """Ink on the way and twice as far, and how far out of the image it leads."""
        way = np.array([0.6, 1.0, 1.5, 2.0]) * reach
        ahead = point[:, :, None] + way[:, None] * np.stack((np.sin(angle), np.cos(angle)), -1)[:, :, None]
        outside = np.maximum(np.maximum(1 - ahead, ahead - (self.length - 2)), 0).sum((2, 3))
        y, x = np.clip(np.round(ahead), 0, self.length - 1).astype(np.int64).transpose(3, 0, 1, 2)
        return image[np.arange(len(image))[:, None, None], y, x].sum(2) + outside


def draw(begin: np.ndarray, end: np.ndarray, n: int, radius: float) -> np.ndarray:
    """Ink [B, n, n] in [0, 1] of segments [B, S, 2], with soft edges one pixel wide."""
    grid = np.stack(np.meshgrid(range(n), range(n), indexing="ij"), -1).astype(np.float64)
    ink = np.zeros((len(begin), n, n), np.float32)
    for s in range(begin.shape[1]):
        a, d = begin[:, s, None, None], (end - begin)[:, s, None, None]
        t = (((grid - a) * d).sum(-1, keepdims=True) / (d * d).sum(-1, keepdims=True).clip(1e-12)).clip(0, 1)
        distance = np.linalg.norm(grid - a - t * d, axis=-1)
        ink = np.maximum(ink, (radius + 0.5 - distance).clip(0, 1).astype(np.float32))
    return ink
