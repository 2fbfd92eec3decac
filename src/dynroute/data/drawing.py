"""The embedded data set: 20 shapes in 5 families, drawn from signed distances, with a known difficulty each.

An image is a background with clutter on it, one shape of any colour, angle, size and place, something in
front of the shape, and noise. A difficulty, uniform in 0..1, lowers the contrast and raises clutter, cover
and noise, so that "do harder images take longer routes?" has a ground truth. Made in chunks, each seeded by
its number: a longer split begins with the same images as a shorter one.

Letters: N images of a chunk, P pixels of an image. Coordinates run over -1..1; distances are negative inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dynroute.data.spec import DataOptions, Dataset, DataSpec, Split, assemble

Array: TypeAlias = NDArray[np.float32]
Distance: TypeAlias = Callable[[Array, Array], Array]  # of points, in units where the shape's radius is 1

TRAIN_IMAGES, TEST_IMAGES = 10_000, 2_000
CHUNK = 500  # a multiple of the number of classes, so that every chunk is balanced
CLUTTER = 4  # things behind the shape, at most


def star(points: int, inner: float) -> Distance:
    """A star with tips at radius 1 and notches at `inner`; a regular polygon if that is cos(pi / n)."""
    half = np.pi / points
    notch_x, notch_y = inner * np.cos(half), inner * np.sin(half)
    length = np.hypot(1 - notch_x, notch_y)

    def distance(x: Array, y: Array) -> Array:
        r, angle = np.hypot(x, y), np.arctan2(y, x)
        folded = np.abs((angle + half) % (2 * half) - half)  # one edge stands for all: from tip (1, 0) to the notch
        return ((r * np.cos(folded) - 1) * notch_y + r * np.sin(folded) * (1 - notch_x)) / length

    return distance


def polygon(n: int) -> Distance:
    """The regular polygon with n corners at radius 1."""
    return star(n, float(np.cos(np.pi / n)))


def convex(*corners: tuple[float, float]) -> Distance:
    """The convex polygon with these corners, counter-clockwise."""

    def distance(x: Array, y: Array) -> Array:
        sides = []
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = np.hypot(bx - ax, by - ay)
            sides.append(((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length)
        return np.maximum.reduce(sides)

    return distance


def box(half_width: float, half_height: float, at_x: float = 0.0, at_y: float = 0.0) -> Distance:
    """An upright rectangle around (at_x, at_y)."""
    return lambda x, y: np.maximum(np.abs(x - at_x) - half_width, np.abs(y - at_y) - half_height)


def disc(radius: float = 1.0, at_x: float = 0.0, stretch: float = 1.0) -> Distance:
    """A disc, or an ellipse where `stretch` is not 1."""
    return lambda x, y: np.hypot(x - at_x, y * stretch) - radius


def union(*parts: Distance) -> Distance:
    """What lies in any of the parts."""
    return lambda x, y: np.minimum.reduce([part(x, y) for part in parts])


def minus(whole: Distance, hole: Distance) -> Distance:
    """What lies in the whole and not in the hole."""
    return lambda x, y: np.maximum(whole(x, y), -hole(x, y))


def hollow(whole: Distance, width: float) -> Distance:
    """Only the rim of a shape, `width` wide, on the inner side of its edge."""
    return lambda x, y: np.abs(whole(x, y) + width / 2) - width / 2


FAMILIES: dict[str, dict[str, Distance]] = {
    "round": {
        "disc": disc(0.9),
        "ring": hollow(disc(0.95), 0.32),
        "ellipse": disc(1.0, stretch=1.8),
        "crescent": minus(disc(1.0), disc(0.85, at_x=0.5)),
    },
    "triangles": {
        "triangle": polygon(3),
        "triangle_ring": hollow(polygon(3), 0.25),
        "right_triangle": convex((-0.55, -0.7), (1.0, -0.7), (-0.55, 0.85)),
        "spike": convex((-0.8, -0.36), (1.1, 0.0), (-0.8, 0.36)),
    },
    "quads": {
        "square": box(0.75, 0.75),
        "square_ring": hollow(box(0.8, 0.8), 0.3),
        "bar": box(1.0, 0.28),
        "rhombus": convex((-1.05, 0.0), (0.0, -0.55), (1.05, 0.0), (0.0, 0.55)),
    },
    "stars": {
        "star3": star(3, 0.22),
        "star4": star(4, 0.36),
        "star5": star(5, 0.42),
        "star8": star(8, 0.55),
    },
    "strokes": {
        "plus": union(box(0.95, 0.24), box(0.24, 0.95)),
        "tee": union(box(0.85, 0.22, at_y=0.65), box(0.22, 0.85)),
        "ell": union(box(0.22, 0.9, at_x=-0.6), box(0.8, 0.22, at_y=-0.7)),
        "aitch": union(box(0.2, 0.85, at_x=-0.62), box(0.2, 0.85, at_x=0.62), box(0.6, 0.2)),
    },
}
DISTANCES = tuple(distance for family in FAMILIES.values() for distance in family.values())
SUPERCLASS_OF = tuple(f for f, family in enumerate(FAMILIES.values()) for _ in family)


def shapes(options: DataOptions, seed: int = 0) -> Dataset:
    """The drawn data set, bit-identical for each seed (of the data, not of the training)."""
    size = options.image_size or 32
    spec = DataSpec(
        "shapes",
        size,
        len(DISTANCES),
        tuple(name for family in FAMILIES.values() for name in family),
        superclasses=len(FAMILIES),
        superclass_names=tuple(FAMILIES),
        superclass_of=SUPERCLASS_OF,
    )
    train = draw(options.train_images or TRAIN_IMAGES, size, (seed, 0))
    return assemble(spec, options, train, draw(options.test_images or TEST_IMAGES, size, (seed, 1)))


def draw(count: int, size: int, seed: tuple[int, ...]) -> Split:
    """So many images, classes in turn."""
    chunks = [draw_chunk(size, (*seed, number)) for number in range(-(-count // CHUNK))]
    images = torch.from_numpy(np.concatenate([images for images, _ in chunks])[:count])
    difficulty = torch.from_numpy(np.concatenate([difficulty for _, difficulty in chunks])[:count])
    labels = torch.arange(count) % len(DISTANCES)
    return Split(images, labels, torch.tensor(SUPERCLASS_OF)[labels], difficulty)


def draw_chunk(size: int, seed: tuple[int, ...]) -> tuple[NDArray[np.uint8], Array]:
    """(images uint8 (N, size, size, 3), difficulty float32 (N,)) of CHUNK images."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(CHUNK, dtype=np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.tile(axis, size)[None], np.repeat(axis, size)[None]  # (1, P)
    pixel = np.float32(2 / size)

    back, front = colours(rng, 0.85 - 0.55 * difficulty)
    image = np.repeat(back[:, None, :], size * size, axis=1)  # (N, P, 3)
    for _ in range(CLUTTER):
        shown = (rng.random(CHUNK) < 0.15 + 0.85 * difficulty) * (0.3 + 0.4 * difficulty)
        paint(image, strokes(rng, x, y, 0.06), pixel, rng.random((CHUNK, 3), dtype=np.float32), shown)
    paint(image, placed(rng, x, y, difficulty), pixel, front, np.ones(CHUNK))
    cover = strokes(rng, x, y, 0.02 + 0.1 * difficulty)
    paint(image, cover, pixel, back, (difficulty > 0.3).astype(np.float32))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * (0.02 + 0.11 * difficulty)[:, None, None]
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8).reshape(CHUNK, size, size, 3), difficulty


def colours(rng: np.random.Generator, contrast: Array) -> tuple[Array, Array]:
    """(background, shape), each (N, 3): `contrast` apart in the channel that differs most, the shape brighter, inside 0..1."""
    direction = rng.uniform(0.2, 1, (len(contrast), 3)).astype(np.float32)
    direction *= contrast[:, None] / np.abs(direction).max(axis=1, keepdims=True)
    room = 1 - np.abs(direction)
    middle = 0.5 + (rng.random((len(contrast), 3), dtype=np.float32) - 0.5) * room
    return middle - direction / 2, middle + direction / 2


def placed(rng: np.random.Generator, x: Array, y: Array, difficulty: Array) -> Array:
    """Distances (N, P) of one shape each, classes in turn; turned (harder ones further), scaled and moved in the frame."""
    angle = rng.uniform(-1, 1, (CHUNK, 1)).astype(np.float32) * (0.1 + 0.7 * difficulty)[:, None]
    radius = rng.uniform(0.55, 0.85, (CHUNK, 1)).astype(np.float32)
    centre = rng.uniform(-1, 1, (2, CHUNK, 1)).astype(np.float32) * (0.9 - radius)
    u, v = (x - centre[0]) / radius, (y - centre[1]) / radius
    u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    distance = np.empty_like(u)
    classes = len(DISTANCES)
    for k, of in enumerate(DISTANCES):
        distance[k::classes] = of(u[k::classes], v[k::classes])
    return distance * radius


def strokes(rng: np.random.Generator, x: Array, y: Array, width: float | Array) -> Array:
    """Distances (N, P) of a thick segment each, from a blob to a line right across, of half-width `width`."""
    ax, ay = rng.uniform(-1, 1, (2, CHUNK, 1)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (CHUNK, 1)).astype(np.float32)
    length = rng.uniform(0.02, 1.5, (CHUNK, 1)).astype(np.float32)
    dx, dy = np.cos(angle), np.sin(angle)
    along = ((x - ax) * dx + (y - ay) * dy).clip(0, length)
    return np.hypot(x - ax - along * dx, y - ay - along * dy) - np.reshape(width, (-1, 1)).astype(np.float32)


def paint(image: Array, distance: Array, pixel: np.float32, colour: Array, opacity: NDArray) -> None:
    """Blends a colour (N, 3) into images (N, P, 3) in place; the edge is a smooth step, 1.5 pixels wide."""
    t = (0.5 - distance / (1.5 * pixel)).clip(0, 1)
    alpha = t * t * (3 - 2 * t) * opacity[:, None].astype(np.float32)
    image += alpha[:, :, None] * (colour[:, None, :] - image)
