"""Drawing tools of the phantom: a pixel grid in mm, smooth contours, soft fields, tubes, branching trees."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, sparse


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
        x, y = points[..., 0], points[..., 1]
        turned = np.stack([c * x - s * y + self.shift[0], s * x + c * y + self.shift[1]], axis=-1)
        return turned / self.pixel + (self.size - 1) / 2

    def nearest(self, point: np.ndarray) -> tuple[int, int]:
        """Return the row and the column of the pixel nearest to a patient point (2,) in mm; it may lie outside."""
        col, row = np.round(self.to_pixels(point)).astype(int)
        return row, col

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the patient's x and y of every pixel, float32 (size, size) each."""
        line = (np.arange(self.size, dtype=np.float32) - (self.size - 1) / 2) * self.pixel
        px, py = line[None, :] - self.shift[0], line[:, None] - self.shift[1]
        c, s = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return c * px + s * py, -s * px + c * py

    def coverage(self, contour: np.ndarray):
        """Return (window, share): which part of each pixel a closed contour (N, 2) in mm covers.

        window is a pair of slices into the picture, share float32 in [0, 1]; both empty when it misses the picture.
        """
        p = self.to_pixels(contour)
        x0, y0 = np.maximum(np.floor(p.min(0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(p.max(0)).astype(int) + 2, self.size)
        if x1 <= x0 or y1 <= y0:
            return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), dtype=np.float32)
        # Sub-pixels a side: smooth edges, partial volume in the plane; fewer where a contour is large.
        fine = 8 if self.size < 256 else 4 if (x1 - x0) * (y1 - y0) < 30_000 else 3
        canvas = Image.new("L", ((x1 - x0) * fine, (y1 - y0) * fine), 0)
        inside = (p - (x0, y0) + 0.5) * fine - 0.5
        ImageDraw.Draw(canvas).polygon(inside.ravel().tolist(), fill=255)
        share = np.asarray(canvas.reduce(fine), dtype=np.float32) / 255
        return (slice(y0, y1), slice(x0, x1)), share

    def paint(self, hu: np.ndarray, contour: np.ndarray, value) -> None:
        """Fill a closed contour (N, 2) in mm with `value` HU (a number, or an array of the picture's shape)."""
        fill(hu, *self.coverage(contour), value)

    def mask(self, contour: np.ndarray) -> np.ndarray:
        """Return the coverage of a contour as a whole picture, float32 (size, size)."""
        full = np.zeros((self.size, self.size), dtype=np.float32)
        self.paint(full, contour, 1.0)
        return full

    def distance(self, mask: np.ndarray) -> np.ndarray:
        """Return the distance in mm from each pixel inside `mask` to its edge, 0 outside, float32."""
        step = max(1, self.size // 256)  # half resolution is enough: it only steers soft transitions
        near = ndimage.distance_transform_edt(mask[::step, ::step] > 0.5, self.pixel * step).astype(np.float32)
        return np.asarray(Image.fromarray(near).resize((self.size, self.size), Image.Resampling.BILINEAR))

    def field(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """Return smooth noise, mean 0 and sd 1, whose bumps are about `scale` mm wide, float32 (size, size).

        A cubic B-spline over a coarse random lattice, as two sparse matrix products: cheap at any smoothness, and the
        same on any number of threads.
        """
        n = max(4, round(self.size * self.pixel / scale) + 3)
        values = 2.1 * rng.standard_normal((n, n), dtype=np.float32)  # 2.1 undoes what the spline smooths away
        at = np.linspace(0, n - 3 - 1e-6, self.size)
        left, t = at.astype(int), at % 1
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
        columns = left[:, None] + np.arange(4)
        weights, ends = weights.astype(np.float32), np.arange(0, 4 * self.size + 1, 4)
        basis = sparse.csr_array((weights.ravel(), columns.ravel(), ends), (self.size, n))
        return basis @ (basis @ values.T).T

    def tubes(self, points: np.ndarray, radius, slope, out: np.ndarray | None = None) -> np.ndarray:
        """Return which share of each pixel's slab short pieces of tube fill, float32 (size, size).

        Args:
            points: (N, 3) mm, sampled densely along the tubes; (N, 2) lie at z = 0, the middle of the slab.
            radius: (N,) or a number, mm.
            slope: (N,) or a number, the share of the tube's direction that lies in the plane, 0 (end-on) to 1.
            out: tubes drawn before, to which these are added.
        """
        out = np.zeros((self.size, self.size), dtype=np.float32) if out is None else out
        z = points[:, 2] if points.shape[1] == 3 else np.zeros(len(points))
        half, soft = self.thickness / 2, 0.35 * self.pixel  # half the pixel: its own partial volume in the plane
        seen = np.abs(z) < half + radius
        at = self.to_pixels(points[seen, :2])
        z, radius, slope = (np.broadcast_to(v, len(points))[seen] for v in (z, radius, slope))
        corner, reach = np.round(at).astype(int), np.ceil(radius / self.pixel + 0.5).astype(int)
        inside = ((corner >= reach[:, None]) & (corner < self.size - reach[:, None])).all(1)
        for h in np.unique(reach[inside]):
            some = inside & (reach == h)
            dy, dx = np.mgrid[-h : h + 1, -h : h + 1].reshape(2, 1, -1).astype(np.float32)
            x, y, r, m, s = (v[some, None].astype(np.float32) for v in (*(at - corner).T, radius, z, slope))
            d2 = ((dx - x) ** 2 + (dy - y) ** 2) * self.pixel**2
            chord = np.sqrt(np.maximum((r + soft) ** 2 - d2, 0)) * (r / (r + soft) / np.maximum(s, 0.2))
            share = (np.minimum(m + chord, half) - np.maximum(m - chord, -half)) / self.thickness
            ok = share > 0
            place = (corner[some] @ (1, self.size))[:, None] + (dy * self.size + dx).astype(int)
            np.maximum.at(out.reshape(-1), place[ok], np.minimum(share[ok], 1))
        return out


def smooth_contour(points: np.ndarray, per_point: int = 12, closed: bool = True) -> np.ndarray:
    """Return a Catmull-Rom curve through `points` (N, 2) -> (N * per_point, 2)."""
    p = np.asarray(points, dtype=float)
    p = np.vstack([p[-1], p, p[:2]] if closed else [2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    t = np.linspace(0, 1, per_point, endpoint=False)[None, :, None]
    b, p, a, a2 = (p[k : len(p) - 3 + k, None, :] for k in range(4))
    curve = p + 0.5 * t * (a - b + t * (2 * b - 5 * p + 4 * a - a2 + t * (3 * (p - a) + a2 - b)))
    return curve.reshape(-1, 2)


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, bumps=()) -> np.ndarray:
    """Return a closed contour (N, 2); `bumps` (K, 2) are amplitudes and phases of harmonics 2, 3, ..."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    r = 1 + sum(size * np.cos(k * t + phase) for k, (size, phase) in enumerate(bumps, start=2))
    x, y = rx * r * np.cos(t), ry * r * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1)


def band(path: np.ndarray, half_width: np.ndarray | float) -> np.ndarray:
    """Return the outline (2N, 2) of a band of given half width (scalar or (N,)) along an open path (N, 2)."""
    tangent = np.gradient(path, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    w = np.broadcast_to(np.asarray(half_width, dtype=float), len(path))[:, None]
    return np.vstack([path + normal * w, (path - normal * w)[::-1]])


def fill(picture: np.ndarray, window: tuple[slice, slice], share: np.ndarray, value) -> None:
    """Mix `value`, a number or a whole picture, into a window of a picture, by its share of each pixel there."""
    value = value[window] if isinstance(value, np.ndarray) else value
    picture[window] += share * (value - picture[window])


def window_of(mask: np.ndarray) -> tuple[slice, slice] | None:
    """Return the smallest window (rows, columns) that holds all of a mask (H, W), None when the mask is empty."""
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)) if len(rows) else None


@dataclass
class Tree:
    """Branches of a tree: start and end (N, 3) mm, radius (N,) mm at the start, generation (N,)."""

    start: np.ndarray
    end: np.ndarray
    radius: np.ndarray
    tip: np.ndarray  # radius at the end
    depth: np.ndarray

    def sample(self, rng: np.random.Generator, step: float):
        """Return points (M, 3), radius (M,), slope (M,) and branch number (M,) along gently curved branches."""
        along = self.end - self.start
        length = np.linalg.norm(along, axis=1)
        bend = rng.normal(0, 0.06, along.shape) * length[:, None]  # straight vessels look false
        count = np.maximum(2, np.ceil(length / step).astype(int))
        branch = np.repeat(np.arange(len(count)), count)
        t = (np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)) / count[branch]
        points = self.start[branch] + along[branch] * t[:, None] + bend[branch] * (4 * t * (1 - t))[:, None]
        slope = np.hypot(along[:, 0], along[:, 1]) / np.maximum(length, 1e-6)
        radius = self.radius[branch] + (self.tip - self.radius)[branch] * t
        return points, radius, slope[branch], branch


def grow_tree(rng: np.random.Generator, root: np.ndarray, targets: np.ndarray, tip: float, power: float) -> Tree:
    """Grow a tree from `root` (3,) that reaches every one of `targets` (N, 3), in mm.

    Each branch heads for the middle of the targets it must serve, then shares them between two children, so
    that the tree fills the lung and thins toward the pleura. A branch that serves n targets has the radius
    tip * n ** power (Murray 1926, https://doi.org/10.1073/pnas.12.3.207: power 1/3).
    """
    branches = []  # start, end, targets served, targets served at the end, depth
    chance = iter(rng.random((len(targets), 4)).tolist())  # all at once: a draw of its own for each is slow
    todo = [(np.asarray(root, dtype=float), targets, 0)]
    while todo:
        start, group, depth = todo.pop()
        n = len(group)
        if n == 1:
            branches.append((start, group[0], 1, 0.35, depth))
            continue
        way, first, second, share = next(chance)
        heading = group.sum(0) / n - start
        end = start + heading * (0.35 + 0.27 * way)
        branches.append((start, end, n, max(1.0, 0.62 * n), depth))
        if n == 2:
            todo += [(end, group[:1], depth + 1), (end, group[1:], depth + 1)]
            continue
        # Share the targets by a plane that holds the heading and parts two random ones of them.
        one = int(n * first)
        side = group[one] - group[one - 1 - int((n - 1) * second)]
        side -= heading * (side @ heading / max(heading @ heading, 1e-9))
        cut = min(max(round(n * (0.28 + 0.44 * share)), 1), n - 1)
        order = (group @ side).argsort()
        todo += [(end, group[order[:cut]], depth + 1), (end, group[order[cut:]], depth + 1)]
    start, end, served, after, depth = (np.array(column) for column in zip(*branches, strict=True))
    return Tree(start, end, tip * served**power, tip * after**power, depth)
