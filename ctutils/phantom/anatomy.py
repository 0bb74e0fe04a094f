"""Stage 1 of the phantom: a body without a finding, as an axial slice in Hounsfield units (HU)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
from scipy.interpolate import interp1d

from ctutils.phantom.shapes import ALL, Forest, Grid, Window, band, ellipse, fill, smooth_contour

LUNG_HEIGHT = 230.0  # mm from apex to base; level 0 is the apex, 1 the base

# Right lung at five levels, in units of the rib cage's half width and half depth: x away from the midline, y to
# the back. Each row runs from the front edge at the mediastinum round the ribs and back along the spine.
LUNG_LEVELS = (0.04, 0.25, 0.45, 0.72, 1.0)
LUNG_SHAPES = np.array(
    [
        [(.28, -.35), (.42, -.45), (.58, -.40), (.72, -.18), (.80, .08), (.78, .36), (.68, .60), (.52, .74),
         (.36, .70), (.25, .52), (.21, .34), (.19, .16), (.19, -.04), (.22, -.21)],
        [(.08, -.80), (.29, -.90), (.57, -.80), (.81, -.48), (.93, -.05), (.91, .40), (.77, .74), (.53, .93),
         (.32, .87), (.22, .62), (.18, .38), (.17, .12), (.17, -.20), (.14, -.52)],
        [(.05, -.90), (.28, -.98), (.59, -.86), (.86, -.51), (.985, -.05), (.95, .42), (.78, .78), (.53, .99),
         (.30, .93), (.21, .64), (.14, .40), (.22, .14), (.25, -.20), (.16, -.60)],
        [(.12, -.86), (.34, -.96), (.63, -.86), (.88, -.52), (1.0, -.02), (.97, .45), (.80, .82), (.55, 1.02),
         (.31, .96), (.21, .68), (.15, .42), (.20, .16), (.28, -.12), (.25, -.52)],
        [(.30, -.70), (.42, -.83), (.65, -.77), (.88, -.45), (.99, .02), (.98, .48), (.81, .85), (.55, 1.06),
         (.31, 1.0), (.22, .74), (.17, .50), (.22, .30), (.33, .10), (.34, -.30)],
    ]
)  # fmt: skip


class Patient(SimpleNamespace):
    """What stays the same in all slices of one patient; lengths in mm, densities in HU."""

    @staticmethod
    def draw(rng: np.random.Generator) -> "Patient":
        """Draw a patient; the same distributions whatever the class."""
        half_width = float(np.clip(rng.normal(166, 13), 140, 194))
        fat = float(rng.gamma(3.0, 3.2) + 4)
        female = rng.random() < 0.45
        return Patient(
            half_width=half_width,
            half_depth=half_width * rng.uniform(0.62, 0.74),
            fat=min(fat, 30.0),
            muscle=rng.uniform(6, 12),
            roundness=rng.uniform(2.15, 2.7),
            breasts=rng.uniform(10, 42) if female else 0.0,
            arms_up=rng.random() < 0.85,
            vertebra=rng.uniform(16, 20),
            aorta=rng.uniform(10, 14.5),
            trachea=rng.uniform(7, 9),
            lung=float(np.clip(rng.normal(-885, 30), -925, -800)),
            gradient=rng.uniform(15, 95),
            contrast=rng.uniform(90, 240) if rng.random() < 0.55 else 0.0,
            gas=rng.uniform(-1000, -958),  # what air inside the chest reads: scatter lifts it a little
            emphysema=rng.uniform(0.2, 1) if rng.random() < 0.35 else 0.0,
            spine=rng.uniform(0.58, 0.68),  # how far back the vertebra stands, in half depths of the cage
            heart=rng.uniform(0.88, 1.15),
            seed=rng.random(48),  # for the small quirks of this body
        )


@dataclass
class Scene:
    """A slice under way: the picture in HU and what a finding needs to know about it.

    hu, lung (share of lung tissue, 0..1), wall (mm from the chest wall, inside the cage): float32 (size, size);
    x, y: the patient's coordinates of every pixel in mm; hilum: (2, 2), right and left; sides: two contours.
    """

    grid: Grid
    patient: Patient
    level: float
    hu: np.ndarray
    lung: np.ndarray
    wall: np.ndarray
    inner: np.ndarray  # mm from the lung's own edge
    x: np.ndarray
    y: np.ndarray
    hilum: np.ndarray
    sides: list
    blood: float
    body: np.ndarray  # contour of the skin
    cage: tuple[float, float, float]  # rib cage: half width, half depth, y of its middle, mm
    bend: Callable  # bends contours a little, the same for all of a slice
    chest: Window  # holds every pixel with lung or inside the cage
    whole: "Scene | None" = None  # of a part of a scene: the scene
    window: Window = ALL  # and where the part lies in it

    def part(self, window: Window) -> "Scene":
        """Return a window of the scene: its pictures are views, so that what is drawn there is in the scene."""
        views = {name: getattr(self, name)[window] for name in ("hu", "lung", "wall", "inner", "x", "y")}
        return replace(self, whole=self, window=window, **views)

    def field(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """Return smooth noise of the scene's shape, float32; see `Grid.field`."""
        return self.grid.field(rng, scale)(self.window)

    def tubes(self, points: np.ndarray, radius, slope) -> np.ndarray:
        """Return which share of each pixel's slab tubes fill; see `Grid.tubes`."""
        return self.grid.tubes(points, radius, slope)[self.window]

    def nearest(self, point: np.ndarray) -> tuple[int, int]:
        """Return row and column, in a part, of the pixel nearest to a point (2,) in mm; it may lie outside."""
        col, row = np.round(self.grid.to_pixels(point)).astype(int).tolist()
        return row - self.window[0].start, col - self.window[1].start

    def paint(self, contour: np.ndarray, value) -> None:
        """Fill a contour (N, 2), bent first, with `value` HU, a number or a picture."""
        self.grid.paint(self.hu, self.bend(contour), value)

    def put(self, contour: np.ndarray, value) -> None:
        """The same for an organ: no lung is left where it stands."""
        window, share = self.grid.coverage(self.bend(contour))
        fill(self.hu, window, share, value)
        fill(self.lung, window, share, 0.0)


def draw_anatomy(grid: Grid, patient: Patient, level: float, rng: np.random.Generator) -> Scene:
    """Draw the slice of `patient` at `level` (0 apex .. 1 base) without any finding.

    Args:
        grid: pixels, position, slice thickness.
        patient: the body.
        level: where the slice lies in the chest.
        rng: the body's own stream; vessels and texture come from it.
    Returns:
        the scene; air outside the body is -1024 HU.
    """
    p, q = patient, patient.seed
    x, y = grid.coordinates()
    hu = np.full((grid.size, grid.size), -1024, dtype=np.float32)
    size, wave, phase = rng.normal(0, 1.6, (3, 2)), rng.normal(0, 1 / 48, (3, 2)), rng.uniform(0, 2 * np.pi, 3)

    def bend(points):
        return points + np.sin(points @ wave.T + phase) @ size

    skin = bend(_body_contour(p, level))
    # The rib cage: half width and half depth of the lungs' outer edge.
    taper = np.interp(level, [0, 0.12, 0.3, 0.6, 1], [0.86, 0.93, 0.98, 1.0, 1.0])
    w = (p.half_width - p.fat - p.muscle - 9.5) * taper  # a rib is 7.5 thick
    h = p.half_depth - p.fat * 0.75 - p.muscle * 0.9 - 11.5
    cy = -0.035 * p.half_depth - 2
    sides = [_lung_contour(level, side, w, h, cy, p) for side in (-1, 1)]
    # Inner edge of the rib cage: the costal edges of both lungs, joined in front and behind.
    right, left = (s[: 9 * 12 - 6 : 4] for s in sides)
    cage = np.vstack([left, right[::-1]])
    hilum = np.array([(-0.24 * w, cy + 0.08 * h), (0.25 * w, cy + 0.10 * h)])
    sides = [bend(s) for s in sides]
    lung = np.maximum(grid.mask(sides[0]), grid.mask(sides[1]))
    ribs = bend(cage)
    wall = grid.distance(grid.mask(ribs))  # at half resolution, so it reaches a little farther than the ribs
    chest = grid.around(grid.to_pixels(np.vstack([*sides, ribs])), 3 + grid.size // 128)
    blood = 42.0 + p.contrast * 0.85
    scene = Scene(grid, p, level, hu, lung, wall, wall, x, y, hilum, sides, blood, skin, (w, h, cy), bend, chest)

    grid.paint(hu, skin, 10.0)
    grid.paint(hu, skin * (1 - 2.0 / p.half_width), _texture(grid, rng, -106, 5, 9))
    if p.breasts and 0.35 < level < 0.85:
        _breast_glands(scene, rng)
    muscle = 52 + 7 * scene.field(rng, 6)
    fat_only = hu.copy()
    _chest_wall(scene, muscle)
    scene.paint((cage - (0, cy)) * 1.025 + (0, cy), muscle)
    grid.paint(fat_only, skin * (1 - 5.0 / p.half_width), hu)  # no muscle reaches the skin
    hu[:] = fat_only
    mediastinum = smooth_contour(
        np.array([(-.55, -.78), (0, -.96), (.55, -.78), (.6, 0), (.5, .5), (0, .66), (-.5, .5), (-.6, 0)]) * (w, h)
    ) + (0, cy)  # fmt: skip
    grid.paint(hu, mediastinum, _texture(grid, rng, -95, 14, 7))

    # Lungs: parenchyma with a dorsal gradient, clouds of perfusion, lobules.
    part = scene.part(chest)
    lung_hu = p.lung + p.gradient * np.clip((part.y - cy) / (2 * h) + 0.1, -0.5, 0.7)
    lung_hu += (12 + 9 * q[0]) * part.field(rng, 38) + (8 + 8 * q[1]) * part.field(rng, 7)
    if p.emphysema:
        lung_hu -= p.emphysema * 95 * np.clip(part.field(rng, 9) + 0.5 * part.field(rng, 45) - 0.8, 0, 1.4)
    # Fine texture of the parenchyma: vessels and septa too small to draw, more in some than in others.
    lung_hu += 26 * q[2] ** 1.5 * part.field(rng, 2.6 + 1.6 * q[3])
    part.hu += part.lung * (np.maximum(lung_hu, -970).astype(np.float32) - part.hu)

    spine_y = cy + p.spine * h
    _ribs_and_sternum(scene, ribs, rng)
    _vertebra(scene, spine_y, rng)
    _organs(scene, spine_y, rng)
    scene.inner = grid.distance(scene.lung)
    _vessels_and_airways(scene.part(chest), rng)
    return scene


def _texture(grid: Grid, rng, mean: float, sd: float, scale: float) -> Callable:
    """Return what fills a window with soft tissue, HU; drawn only where it is wanted."""
    cloud = grid.field(rng, scale)
    return lambda window: mean + sd * cloud(window)


def _body_contour(p: Patient, level: float) -> np.ndarray:
    """Skin: a superellipse with a sternal and a spinal groove, shoulders near the apex, and breasts."""
    t = np.linspace(-np.pi, np.pi, 180, endpoint=False)  # 0 is the patient's left, -pi/2 the front
    c, s = np.cos(t), np.sin(t)
    r = (np.abs(c) ** p.roundness + np.abs(s) ** p.roundness) ** (-1 / p.roundness)
    shoulder = np.clip((0.32 - level) / 0.3, 0, 1) * (0.14 if p.arms_up else 0.24)
    x = p.half_width * r * c * (1 + shoulder * (0.6 + 0.4 * s))
    y = p.half_depth * r * s * (1 - 0.03 * shoulder / 0.14 * (s < 0))
    y += 3 * np.exp(-((x / 22) ** 2)) * (s < 0) - 6 * np.exp(-((x / 20) ** 2)) * (s > 0)
    if p.breasts:
        size = p.breasts * np.exp(-(((level - 0.62) / 0.17) ** 2))
        y -= size * np.exp(-(((np.abs(x) - 0.52 * p.half_width) / (0.30 * p.half_width)) ** 2)) * (s < 0)
        x *= 1 + 0.10 * size / 40 * np.clip(-s, 0, 1) * np.abs(c)
    return np.stack([x, y], axis=1)


def _breast_glands(scene, rng):
    p, gland = scene.patient, _texture(scene.grid, rng, -60, 70, 8)
    size = p.breasts * np.exp(-(((scene.level - 0.62) / 0.17) ** 2))
    for side in (-1, 1):
        shape = ellipse(side * 0.53 * p.half_width, -0.82 * p.half_depth - 0.5 * size, 0.16 * p.half_width, 0.42 * size,
                        side * 0.35, rng.normal(0, 0.07, (3, 2)))  # fmt: skip
        if size > 8:
            scene.grid.paint(scene.hu, shape, lambda window: np.clip(gland(window), -100, 45))


def _lung_contour(level, side, w, h, cy, p) -> np.ndarray:
    shape = interp1d(LUNG_LEVELS, LUNG_SHAPES, axis=0, bounds_error=False, fill_value=LUNG_SHAPES[0])(level)
    quirk = 0.05 * (p.seed[4:32].reshape(14, 2) - 0.5)
    shape = shape + (quirk if side < 0 else quirk[::-1]) * 0.8
    if side > 0 and level > 0.5:  # the heart lies to the left
        shape[10:14, 0] += 0.12 * min(1, (level - 0.5) / 0.2)
    return smooth_contour(shape * (side * w, h) + (0, cy))


def _chest_wall(scene, muscle):
    """Muscle shell with fat planes, pectorals, back muscles, scapulae."""
    p, level, (w, h, cy) = scene.patient, scene.level, scene.cage
    half = np.array([(0, -.97), (.28, -1.0), (.60, -.88), (.87, -.53), (1.0, -.04), (.97, .43), (.81, .80), (.55, 1.02),
                     (.30, 1.0), (0, .80)])  # fmt: skip
    cage = smooth_contour(np.vstack([half, half[1:-1][::-1] * (-1, 1)]) * (w, h) + (0, cy))
    # A muscle shell; in it a fat plane between the muscle layers and the ribs.
    for wide, deep, value in ((p.muscle + 7.5, p.muscle * 0.8 + 7.5, muscle), (10.5, 9.5, -90.0), (8.8, 8.2, muscle)):
        scene.paint((cage - (0, cy)) * (1 + wide / w, 1 + deep / h) + (0, cy), value)

    def along(points, offset=(0, 0)):
        return smooth_contour(np.array(points) * (side * w, h) + (0, cy) + offset, closed=False)

    for side in (-1, 1):
        # Erector muscles beside the spinous process.
        scene.paint(ellipse(side * 25, cy + 1.03 * h + 8, 25, 13, side * 0.12), muscle)
        if level < 0.62:  # pectorals
            size = np.interp(level, [0, 0.2, 0.45, 0.62], [1.0, 1.25, 0.9, 0.3])
            path = along([(0.16, -1.10), (0.42, -1.14), (0.72, -0.94), (0.98, -0.58)], (0, -4))
            scene.paint(band(path, size * 7.5 * np.sin(np.linspace(0.25, 2.9, len(path)))), muscle)
        if level < 0.55:
            # Axilla: fat between the wall and the scapular muscles, then the blade between its muscles.
            far = np.interp(level, [0, 0.2, 0.55], [1.16, 1.20, 1.13])
            scene.paint(ellipse(side * far * w * 0.985, cy - 0.15 * h, 9, 26, side * 0.1), -100.0)
            low = np.interp(level, [0, 0.25, 0.55], [0.0, 0.1, 0.3])
            path = along([(1.19, -0.05 + low), (1.12, 0.35 + low), (0.98, 0.66 + low * 0.7), (0.74, 0.98 + low * 0.3)])
            bulk = np.interp(level, [0, 0.25, 0.55], [15, 13, 8])
            scene.paint(band(path, bulk * np.sin(np.linspace(0.3, 2.9, len(path)))), muscle)
            blade = path[6:-6] + (side * 1.0, 1.0)
            scene.paint(band(blade, 3.2), 520.0)
            scene.paint(band(blade[3:-3], 1.5), 160.0)
        if level < 0.14:  # clavicle
            for wide, deep, value in ((20, 6, 560.0), (17, 3.6, 180.0)):
                scene.paint(ellipse(side * 0.55 * w, cy - 0.92 * h, wide, deep, side * 0.3), value)
        if level > 0.3:  # latissimus and serratus: the fat planes between them
            path = along([(1.08, -0.35), (1.12, 0.1), (1.08, 0.5), (0.92, 0.85)], (side * 5, 0))
            scene.paint(band(path, 1.4), -80.0)


def _ribs_and_sternum(scene, cage, rng):
    """Five to eight rib cuts a side: curved bars with a cortex, longer where the rib runs in the slice."""
    hu, grid, n, (_, h, cy) = scene.hu, scene.grid, len(cage), scene.cage
    centre, closed, numbers = cage.mean(0), np.vstack([cage, cage[:1]]), np.arange(len(cage) + 1)
    ends, along = np.sin(np.linspace(0.35, np.pi - 0.35, 14)) ** 0.5, np.linspace(-1, 1, 14)[:, None]
    for side in (-1, 1):
        at = 0.06 + 0.04 * rng.random()
        while at < 0.43:
            length = rng.uniform(0.028, 0.07) * (0.8 if at < 0.12 else 1.0)
            i = (np.linspace(at, at + length, 14) * n) % n
            i = i if side > 0 else (n - i) % n
            path = np.stack([np.interp(i, numbers, closed[:, k]) for k in (0, 1)], axis=1)
            out = path - centre
            out /= np.linalg.norm(out, axis=1, keepdims=True)
            path = path + out * (5.6 + along * rng.normal(0, 1.3))
            thick = rng.uniform(3.1, 4.3)
            if at < 0.10 and scene.level > 0.2:  # costal cartilage in front
                grid.paint(hu, band(path, thick * 1.2 * ends), 95.0)
            else:
                grid.paint(hu, band(path, thick * ends), rng.uniform(450, 800))
                grid.paint(hu, band(path[2:-2], (thick - 1.4) * ends[2:-2]), rng.uniform(110, 240))
            at += length + rng.uniform(0.012, 0.045)
    if 0.12 < scene.level < 0.9:
        wide = np.interp(scene.level, [0.12, 0.3, 0.6, 0.9], [27, 20, 17, 8])
        for rx, ry, value in ((wide, 6.0, 430.0), (wide - 1.8, 4.2, 140.0)):
            scene.paint(ellipse(0, cy - 1.03 * h - 3.5, rx, ry, 0, [(0.04, 0)]), value)
    elif scene.level <= 0.12:
        for side in (-1, 1):
            for rx, ry, value in ((12, 8, 420.0), (10, 6, 150.0)):
                scene.paint(ellipse(side * 18, cy - 0.82 * h, rx, ry, side * 0.4), value)


def _vertebra(scene, spine_y, rng):
    r, put = scene.patient.vertebra, scene.put

    def plate(points, width, value):
        put(band(smooth_contour(np.array(points) + (0, spine_y), closed=False), width), value)

    marrow = _texture(scene.grid, rng, 170, 45, 4)
    put(ellipse(0, spine_y + 2, r * 1.25, r * 1.12), 45.0)
    put(ellipse(0, spine_y + r * 1.3, r * 1.5, r * 0.9), 50.0)
    disc = rng.random() < 0.25
    put(ellipse(0, spine_y, r * 1.05, r * 0.86), 95.0 if disc else 480.0)
    if not disc:
        put(ellipse(0, spine_y, r * 0.96, r * 0.77), marrow)
    back = r * 0.95
    for side in (-1, 1):
        s = side * r
        if not disc:
            plate([(s * 0.62, r * 0.5), (s * 0.72, back), (s * 0.7, r * 1.5)], 4.2, 520.0)
        reach = rng.uniform(1.7, 2.1)
        plate([(s * 0.7, r * 1.35), (s * 1.2, r * 1.5), (s * reach, r * 1.75)], 4.6, 480.0)
        plate([(s * 0.75, r * 1.37), (s * 1.2, r * 1.52), (s * (reach - 0.2), r * 1.70)], 2.6, 200.0)
        plate([(s * 0.72, r * 1.45), (s * 0.35, r * 1.8), (0, r * 2.0)], 2.8, 560.0)
    plate([(0, r * 1.9), (0.5, r * 2.3), (rng.normal(0, 1.5), r * rng.uniform(2.6, 3.2))], 3.0, 500.0)
    put(ellipse(0, spine_y + back * 1.30, r * 0.52, r * 0.44), -30.0)
    put(ellipse(0, spine_y + back * 1.30, r * 0.36, r * 0.32), 38.0)


def _organs(scene, spine_y, rng):
    """Great vessels, heart, oesophagus, trachea and main bronchi, liver and left dome, by level."""
    grid, p, level, blood, put = scene.grid, scene.patient, scene.level, scene.blood, scene.put
    q, (w, h, cy) = p.seed, scene.cage
    f = (spine_y - (cy - h)) / 125  # depth of the mediastinum against a middle-sized one

    def spot(x, y, rx, ry=None, value=blood, angle=0.0):
        put(ellipse(x, spine_y + y * f, rx, ry or rx, angle, rng.normal(0, 0.02, (3, 2))), value)

    def chamber(x, y, rx, ry, value, angle=0.0):
        """A heart chamber: its edge is soft, because the heart beats."""
        shape = ellipse(0, 0, rx, ry, angle, rng.normal(0, 0.05, (3, 2)))
        for k in range(4):
            place = shape * (1.12 - 0.08 * k) + (x, spine_y + y * f)
            put(place, lambda window, k=k: (tone := shade(window)) + (value - tone) * (k + 1) / 4)

    def fold(points):
        """Mediastinal fat with its pleural edge."""
        put(smooth_contour(np.array(points) * (1, f) + (0, spine_y)), _texture(grid, rng, -92, 12, 6))

    def vessel(points, first, last, value):
        path = smooth_contour(np.array(points) * (1, f) + (0, spine_y), closed=False)
        put(band(path, np.linspace(first, last, len(path))), value)

    shade = _texture(grid, rng, 46, 6, 8)
    ao, x_desc = p.aorta, 20 + 5 * q[33]
    if level < 0.22:
        fold([(-30, -30), (-34, -62), (-24, -88), (0, -96), (24, -88), (32, -60), (28, -28), (0, -14)])
        spot(-17, -70 + 8 * q[34], 8, 7)
        spot(-13, -52, 5.5)
        spot(14, -56, 4.6)
        spot(25, -40, 5.2)
        spot(20, -78, 9, 6.5, blood * 0.8 + 8, 0.5)
    elif level < 0.30:  # arch
        fold([(-24, -30), (-36, -66), (-30, -92), (-4, -108), (22, -96), (36, -62), (32, -26), (0, -12)])
        vessel([(-13, -84), (4, -72), (20, -50), (x_desc, -22)], ao * 1.1, ao * 0.9, blood)
        spot(x_desc, -20, ao)
        spot(-32, -68, 8.5, 9.5, blood * 0.85 + 6)
    elif level < 0.52:
        fold([(-28, -24), (-36, -50), (-42, -76), (-26, -100), (0, -112), (24, -104), (42, -80), (36, -46), (30, -22),
              (0, -14)])  # fmt: skip
        spot(-16, -84, ao * 1.28)
        spot(x_desc, -18, ao * 0.98)
        spot(-37, -72, 8.5, 10, blood * 0.85 + 6)
        if level > 0.38:  # pulmonary trunk; the right artery passes behind the ascending aorta
            spot(19, -86, 14, 13, blood * 1.08, 0.5)
            if level < 0.47:
                vessel([(18, -78), (2, -64), (-20, -60), (-42, -56)], 11, 8, blood * 1.08)
                spot(36, -62, 10, 12, blood * 1.08, 0.6)
    else:
        grow = np.interp(level, [0.52, 0.66, 0.84, 1.0], [0.78, 1.0, 1.0, 0.8]) * p.heart
        x0, y0 = 0.13 * w, spine_y - 70 * f
        shape = ellipse(x0, y0, 0.506 * w * grow, 41 * grow * f, 0.32, [(0.05, 0.4), (0.05, 2.2)])
        put(shape, _texture(grid, rng, -88, 10, 7))
        put((shape - (x0, y0)) * (0.955, 0.94) + (x0, y0), shade)
        if level < 0.62:
            spot(-6, -84, ao * 1.2, ao * 1.15, blood)
            chamber(22, -96, 17, 13, blood * 1.05, 0.6)
            chamber(8, -50, 27, 12, blood * 0.95, 0.05)
            chamber(-34, -78, 11, 15, blood * 0.85)
        elif level < 0.92:
            chamber(-0.22 * w, -66, 17 * grow, 22 * grow, blood * 0.9, 0.3)
            chamber(10, -90, 30 * grow, 14 * grow, blood * 0.95, 0.28)
            chamber(0.30 * w, -62, 25 * grow, 14 * grow, blood, 0.75)
            if level < 0.78:
                chamber(6, -45, 26, 12, blood * 0.95, 0.1)
        spot(x_desc - 2, -18, ao * 0.9)
        if level > 0.7:
            spot(-24, -42, 11, 9, blood * 0.85)  # inferior vena cava
    if level > 0.3:
        spot(-8, -18, 4, 4, blood * 0.9)  # azygos
    # Oesophagus, with air in it in some.
    for rx, ry, value in ((8, 5.5, 42.0), (3, 1.8, -700.0))[: 2 if q[36] < 0.35 else 1]:
        spot(5 + 4 * q[35], -27 if level > 0.22 else -34, rx, ry, value, 0.2)
    for _ in range(rng.integers(0, 4)):  # small lymph nodes
        spot(rng.uniform(-26, 26), rng.uniform(-75, -40), rng.uniform(2, 4.5), rng.uniform(2, 3.5), 45.0)

    # Trachea, carina, main bronchi: a wall, then the air in it.
    r, y_t, x_t = p.trachea, -44, -3 + 3 * (q[37] - 0.5)
    if level <= 0.36:
        spot(x_t, y_t, r + 1.6, r + 1.6, 40.0)
        spot(x_t, y_t, r, r * 1.03, p.gas)
    elif level < 0.41:
        for rx, ry, value in ((0.98, 0.95, 40.0), (0.83, 0.8, p.gas)):
            for side in (-1, 1):
                spot(x_t + side * r * 0.85, y_t, r * rx, r * ry, value)
    elif level < 0.56:
        spread = (level - 0.41) / 0.15
        for side, radius in ((-1, 0.78), (1, 0.68)):
            x0 = side * (8 + 20 * spread)
            spot(x0, y_t - 2, radius * r + 1.4 + 1.5 * spread, radius * r + 1.3, 40.0, side * 0.4)
            spot(x0, y_t - 2, radius * r + 1.5 * spread, radius * r, p.gas, side * 0.4)
    # Hila: the big branches beside the heart, with the lobar bronchi between them.
    if 0.40 < level < 0.66:
        near = 1 - abs(level - 0.53) / 0.16
        for side, (hx, hy) in zip((-1, 1), scene.hilum, strict=True):
            x0 = hx - side * (9 - 3 * near) + rng.normal(0, 2)
            for _ in range(3):
                r = rng.uniform(3.2, 4.5) + 3.0 * near
                x1, y1 = x0 + side * rng.uniform(-2, 7), hy + rng.uniform(-15, 13)
                put(ellipse(x1, y1, r, r * rng.uniform(0.8, 1.2)), blood)
            for _ in range(2):
                r = rng.uniform(2.4, 4.2)
                shape = ellipse(x0 + side * rng.uniform(-1, 8), hy + rng.uniform(-11, 9), r, r * rng.uniform(0.75, 1.1))
                centre = shape.mean(0)
                put(centre + (shape - centre) * (1 + 1.3 / r), 35.0)
                put(shape, p.gas)
    # Domes: liver on the right, stomach and spleen on the left.
    for side, first, share in ((-1, 0.74 + 0.08 * q[38], 1.0), (1, 0.82 + 0.09 * q[39], 0.9)):
        if level > first:
            grow = min(1.0, (level - first) / 0.3) ** 0.5 * share
            x0, y0 = side * 0.52 * w, cy - 0.10 * h
            shape = ellipse(x0, y0, 0.50 * w * grow, 0.72 * h * grow, side * -0.12, [(0.03, 0.3), (0.03, 1.1)])
            put(shape, _texture(grid, rng, 58 + p.contrast * 0.3, 6, 8))
            if side > 0 and q[40] < 0.6 and grow > 0.5:
                put(ellipse(x0, y0 - 0.25 * h, 0.2 * w * grow, 0.16 * h * grow), p.gas)


def _vessels_and_airways(scene, rng):
    """Arteries, veins and bronchi: trees in space that fill the lung, cut by the slab."""
    hu, grid, p = scene.hu, scene.grid, scene.patient
    above = (0.47 - scene.level) * LUNG_HEIGHT * 0.5
    deep, forest, kinds = scene.lung > 0.9, Forest(), []
    for side, root in zip((-1, 1), scene.hilum, strict=True):
        own = np.flatnonzero(deep & (scene.x * side > 0))
        for kind, most, back, up in (("artery", 270, 0, -3), ("vein", 216, -6, 5)):
            n = int(min(most, len(own), 1200 * len(own) / max(deep.sum(), 1)))  # fewer where little lung is left
            if n < 8:
                continue
            at = rng.choice(own, n, replace=False)
            targets = np.stack([scene.x.flat[at], scene.y.flat[at], rng.uniform(-15, 15, n)], axis=1)
            forest.plant(rng, [*(root + rng.normal(0, 3, 2) + (0, back)), np.clip(above, -38, 38) + up], targets)
            kinds.append(kind == "artery")
    if not kinds:
        return
    # A bronchus beside a vessel may reach 1 mm farther.
    points, radius, slope, branch = forest.sample(0.34, 0.40, max(0.5, 0.8 * grid.pixel), grid.thickness / 2 + 1)
    radius = np.minimum(radius, 5.5)
    big = np.array(kinds)[forest.tree[branch]] & (radius > 1.3) & (forest.depth[branch] < 5)
    flat, ahead = points[big], forest.ahead[branch[big]]
    beside = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
    beside /= np.maximum(np.linalg.norm(beside, axis=1, keepdims=True), 1e-6)
    tube = np.minimum(radius[big] * 0.8, 4.0)
    flat[:, :2] += beside * (radius[big] + tube)[:, None]
    thick = 0.4 + 0.1 * tube + 0.5 * (p.seed[41] < 0.25)  # bronchial wall thickening in some
    walls, lumens = (scene.tubes(flat, r, slope[big]) for r in (tube + thick, tube))
    filled = scene.tubes(points, radius, slope)
    inside = np.minimum(1, scene.lung + (scene.wall > 12) * (hu < -60))
    for share, value in ((walls, 20.0), (lumens, p.gas + 8), (filled, scene.blood)):
        hu += inside * share * (value - hu)
