"""Drawing tools of the phantom: a pixel grid in mm, smooth contours, soft fields, tubes, branching trees."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, sparse

Window = tuple[slice, slice]  # rows and columns of a picture
ALL = np.s_[:, :]
TURN = np.linspace(0, 2 * np.pi, 72, endpoint=False)


@dataclass(frozen=True)
class Grid:
    """Where the pixels stand in the patient: x to the picture's right, y to the back, in mm.

    The rotation and the position of the patient are part of the grid, so nothing is ever resampled.
    """

    size: int  # pixels a side
    pixel: float  # mm a pixel
    angle: float  # rotation of the patient, radians
    shift: tuple[float, float]  # where the patient's origin stands from the picture's centre, mm
    thickness: float  # slice thickness, mm

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Map patient points (..., 2) in mm to pixel coordinates (..., 2), x first."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        x, y, turned = points[..., 0], points[..., 1], np.empty(points.shape)
        turned[..., 0] = c * x - s * y + self.shift[0]
        turned[..., 1] = s * x + c * y + self.shift[1]
        return turned / self.pixel + (self.size - 1) / 2

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the patient's x and y of every pixel, float32 (size, size) each."""
        line = (np.arange(self.size, dtype=np.float32) - (self.size - 1) / 2) * self.pixel
        px, py = line[None, :] - self.shift[0], line[:, None] - self.shift[1]
        c, s = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return c * px + s * py, -s * px + c * py

    def around(self, pixels: np.ndarray, margin: int = 1) -> Window:
        """Return the window that holds points (N, 2) in pixels, with a margin in pixels."""
        ends = zip(pixels.min(0).tolist(), pixels.max(0).tolist(), strict=True)
        cols, rows = (slice(max(math.floor(a) - margin, 0), min(math.ceil(b) + margin + 1, self.size)) for a, b in ends)
        return rows, cols

    def coverage(self, contour: np.ndarray) -> tuple[Window, np.ndarray]:
        """Return (window, share): which part of each pixel a closed contour (N, 2) in mm covers.

        window is a pair of slices into the picture, share float32 in [0, 1]; both empty when it misses the picture.
        """
        p = self.to_pixels(contour)
        rows, cols = self.around(p)
        high, wide = rows.stop - rows.start, cols.stop - cols.start
        if high <= 0 or wide <= 0:
            return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), dtype=np.float32)
        # Sub-pixels a side: smooth edges, partial volume in the plane; fewer where a contour is large.
        fine = 8 if self.size < 256 else 4 if high * wide < 30_000 else 3
        canvas = Image.new("L", (wide * fine, high * fine), 0)
        inside = (p - (cols.start, rows.start) + 0.5) * fine - 0.5
        ImageDraw.Draw(canvas).polygon(inside.ravel().tolist(), fill=255)
        return (rows, cols), np.frombuffer(canvas.reduce(fine).tobytes(), np.uint8).reshape(high, wide) / np.float32(
            255
        )

    def paint(self, hu: np.ndarray, contour: np.ndarray, value) -> None:
        """Fill a closed contour (N, 2) in mm with `value` HU: a number, a picture, or what makes a window of one."""
        fill(hu, *self.coverage(contour), value)

    def mask(self, contour: np.ndarray) -> np.ndarray:
        """Return the coverage of a contour as a whole picture, float32 (size, size)."""
        full = np.zeros((self.size, self.size), dtype=np.float32)
        self.paint(full, contour, 1.0)
        return full

    def distance(self, mask: np.ndarray) -> np.ndarray:
        """Return the distance in mm from each pixel inside `mask` to its edge, 0 outside, float32."""
        step = max(1, self.size // 256)  # half resolution is enough: it only steers soft transitions
        coarse = mask[::step, ::step] > 0.5
        near = np.zeros(coarse.shape, dtype=np.float32)
        if window := window_of(coarse, 1):  # with its rim: the nearest pixel outside lies there
            near[window] = ndimage.distance_transform_edt(coarse[window], self.pixel * step)
        return np.asarray(Image.fromarray(near).resize((self.size, self.size), Image.Resampling.BILINEAR))

    def field(self, rng: np.random.Generator, scale: float) -> Callable[[Window], np.ndarray]:
        """Return smooth noise, mean 0 and sd 1, whose bumps are about `scale` mm wide: a window -> float32 there.

        A cubic B-spline over a coarse random lattice, as two sparse matrix products: cheap at any smoothness, and the
        same on any number of threads.
        """
        n = max(4, round(self.size * self.pixel / scale) + 3)
        values = 2.1 * rng.standard_normal((n, n), dtype=np.float32)  # 2.1 undoes what the spline smooths away
        weights, columns = _spline(self.size, n)

        def basis(seen: slice):
            share = weights[seen]
            return sparse.csr_array(
                (share.ravel(), columns[seen].ravel(), 4 * np.arange(len(share) + 1)), (len(share), n)
            )

        return lambda window: basis(window[0]) @ (basis(window[1]) @ values.T).T

    def tubes(self, points: np.ndarray, radius, slope) -> np.ndarray:
        """Return which share of each pixel's slab short pieces of tube fill, float32 (size, size).

        points (N, 3) mm lie densely along the tubes, (N, 2) at z = 0, the middle of the slab; radius in mm and slope,
        the share of a tube's direction that lies in the plane, 0 (end-on) to 1, are (N,) or numbers.
        """
        out = np.zeros((self.size, self.size), dtype=np.float32)
        z = points[:, 2] if points.shape[1] == 3 else np.zeros(len(points))
        half, soft = self.thickness / 2, 0.35 * self.pixel  # half the pixel: its own partial volume in the plane
        seen = np.abs(z) < half + radius
        at = self.to_pixels(points[seen, :2])
        z, radius, slope = (np.broadcast_to(v, len(points))[seen] for v in (z, radius, slope))
        corner, reach = np.round(at).astype(int), np.ceil(radius / self.pixel + 0.5).astype(int)
        inside = ((corner >= reach[:, None]) & (corner < self.size - reach[:, None])).all(1)
        place, off = corner @ (1, self.size), (at - corner).T
        for h in np.unique(reach[inside]):
            some = inside & (reach == h)
            x, y, r, m, s = (v[some].astype(np.float32) for v in (*off, radius, z, slope))
            step = np.arange(-h, h + 1)
            dx, dy = ((step.astype(np.float32) - v[:, None]) ** 2 for v in (x, y))
            room = ((r + soft) ** 2)[:, None, None] - (dx[:, None, :] + dy[:, :, None]) * self.pixel**2
            near = np.flatnonzero(room > 0)
            tube, pixel = np.divmod(near, len(step) ** 2)
            chord, m = np.sqrt(room.ravel()[near]) * (r / (r + soft) / np.maximum(s, 0.2))[tube], m[tube]
            share = (np.minimum(m + chord, half) - np.maximum(m - chord, -half)) / self.thickness
            pixel = (step[:, None] * self.size + step).ravel()[pixel] + place[some][tube]
            np.maximum.at(out.reshape(-1), pixel, np.minimum(share, 1))
        return out


@functools.cache
def _spline(size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and lattice indices, (size, 4) each, of a cubic B-spline over n values."""
    at = np.linspace(0, n - 3 - 1e-6, size)
    left, t = at.astype(int), at % 1
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    return weights.astype(np.float32), left[:, None] + np.arange(4)


def smooth_contour(points: np.ndarray, per_point: int = 12, closed: bool = True) -> np.ndarray:
    """Return a Catmull-Rom curve through `points` (N, 2) -> (N * per_point, 2)."""
    p = np.asarray(points, dtype=float)
    p = np.vstack([p[-1], p, p[:2]] if closed else [2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    t = np.linspace(0, 1, per_point, endpoint=False)[:, None]
    b, p, a, a2 = (p[k : len(p) - 3 + k, None, :] for k in range(4))
    curve = p + 0.5 * t * (a - b + t * (2 * b - 5 * p + 4 * a - a2 + t * (3 * (p - a) + a2 - b)))
    return curve.reshape(-1, 2)


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, bumps=()) -> np.ndarray:
    """Return a closed contour (N, 2); `bumps` (K, 2) are amplitudes and phases of harmonics 2, 3, ..."""
    r = 1 + sum(size * np.cos(k * TURN + phase) for k, (size, phase) in enumerate(bumps, start=2))
    x, y = rx * r * np.cos(TURN), ry * r * np.sin(TURN)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1)


def band(path: np.ndarray, half_width: np.ndarray | float) -> np.ndarray:
    """Return the outline (2N, 2) of a band of given half width (scalar or (N,)) along an open path (N, 2)."""
    tangent = np.vstack([path[1] - path[0], (path[2:] - path[:-2]) / 2, path[-1] - path[-2]])
    tangent /= np.maximum(np.sqrt((tangent**2).sum(1, keepdims=True)), 1e-6)
    beside = tangent[:, ::-1] * (-1, 1) * np.reshape(half_width, (-1, 1))
    return np.vstack([path + beside, (path - beside)[::-1]])


def fill(picture: np.ndarray, window: Window, share: np.ndarray, value) -> None:
    """Mix `value`, a number, a whole picture or what makes a window of one, into a window of a picture by its share."""
    value = value(window) if callable(value) else value[window] if isinstance(value, np.ndarray) else value
    mixed = value - picture[window]
    mixed *= share
    picture[window] += mixed


def window_of(mask: np.ndarray, margin: int = 0) -> Window | None:
    """Return the smallest window (rows, columns) that holds all of a mask (H, W), None when the mask is empty."""
    rows, cols = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
    return tuple(slice(max(at[0] - margin, 0), at[-1] + 1 + margin) for at in (rows, cols)) if rows else None


class Forest:
    """Trees in space that are grown together, all branches of a generation at once.

    Each branch heads for the middle of the targets it must serve, then shares them between two children, so that the
    tree fills the lung and thins toward the pleura. A branch that serves n targets has the radius tip * n ** power
    (Murray 1926, https://doi.org/10.1073/pnas.12.3.207: power 1/3).

    Once grown, of every branch: `ahead` (N, 3) mm from start to end, `depth`, its generation, and `tree`.
    """

    def __init__(self):
        self.planted = []

    def plant(self, rng: np.random.Generator, root: np.ndarray, targets: np.ndarray) -> None:
        """Add a tree from `root` (3,) to `targets` (N, 3), in mm, with all that chance will decide in it."""
        n = len(targets)  # so 2 n - 1 branches, n - 1 of them forked
        self.planted.append((root, n, targets, rng.random((n, 4)), rng.normal(0, 0.06, (2 * n - 1, 3))))

    def sample(self, tip: float, power: float, step: float, near: float = np.inf):
        """Grow: return points (M, 3) and radius (M,) in mm, slope (M,) and branch number (M,), every `step` mm.

        Branches whose surface stays more than `near` mm from the slab's middle are left out.
        """
        start, n, *rest = zip(*self.planted, strict=True)
        start, n, (points, chance, bend) = np.array(start, dtype=float), np.array(n), map(np.concatenate, rest)
        self.tree = np.repeat(np.arange(len(n)), 2 * n - 1)
        # A tree's branches are numbered from its root, always through the second child first.
        fork = np.cumsum(n) - n
        name, depth = 2 * fork - np.arange(len(n)), 0
        begin, end = np.empty((2, len(bend), 3))
        served, after, self.depth = np.empty((3, len(bend)))
        while len(n):
            node = np.repeat(np.arange(len(n)), n)
            middle = np.stack([np.bincount(node, points[:, k]) for k in range(3)], axis=1) / n[:, None]
            heading = middle - start
            luck = chance[np.minimum(fork, len(chance) - 1)]
            stop = np.where(n[:, None] == 1, middle, start + heading * (0.35 + 0.27 * luck[:, 0])[:, None])
            begin[name], end[name], self.depth[name] = start, stop, depth
            served[name], after[name] = n, np.where(n == 1, 0.35, np.maximum(1.0, 0.62 * n))
            more = n > 1
            points = points[more[node]]
            heading, luck, n, start, fork, name = (v[more] for v in (heading, luck, n, stop, fork, name))
            # Share the targets by a plane that holds the heading and parts two random ones of them.
            node, first = np.repeat(np.arange(len(n)), n), np.cumsum(n) - n
            one = (n * luck[:, 1]).astype(int)
            two = (one - 1 - ((n - 1) * luck[:, 2]).astype(int)) % n
            side = points[first + one] - points[first + two]
            side -= heading * (np.vecdot(side, heading) / np.maximum(np.vecdot(heading, heading), 1e-9))[:, None]
            where = np.where(n[node] == 2, np.arange(len(node)), np.vecdot(points, side[node]))
            points = points[np.lexsort((where, node))]
            cut = np.clip(np.rint(n * (0.28 + 0.44 * luck[:, 3])), 1, n - 1).astype(int)
            rest = n - cut
            fork, name = np.stack([fork + rest, fork + 1], 1).ravel(), np.stack([name + 2 * rest, name + 1], 1).ravel()
            n, start, depth = np.stack([cut, rest], 1).ravel(), np.repeat(start, 2, axis=0), depth + 1

        self.ahead = along = end - begin
        length = np.linalg.norm(along, axis=1)
        bend *= length[:, None]  # straight vessels look false
        thick, thin, z = tip * served**power, tip * after**power, np.stack([begin[:, 2], end[:, 2]])
        far = near + np.maximum(thick, thin) + np.abs(bend[:, 2])
        some = np.flatnonzero((z.min(0) < far) & (z.max(0) > -far))
        count = np.maximum(2, np.ceil(length[some] / step).astype(int))
        branch, share = np.repeat(some, count), np.repeat(count, count)
        t = (np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)) / share
        points = begin[branch] + along[branch] * t[:, None] + bend[branch] * (4 * t * (1 - t))[:, None]
        slope = np.hypot(along[:, 0], along[:, 1]) / np.maximum(length, 1e-6)
        return points, thick[branch] + (thin - thick)[branch] * t, slope[branch], branch
