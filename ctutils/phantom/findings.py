"""Stage 2 of the phantom: what is wrong with the lung. Confounders for every class, then the finding of one."""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from ctutils.phantom.anatomy import Scene
from ctutils.phantom.shapes import Forest, Grid, Window, ellipse, fill, smooth_contour, window_of


def add_confounders(scene: Scene, rng: np.random.Generator) -> None:
    """Draw what any patient may have, with the same chances for every class; changes `scene.hu`."""
    scene = scene.part(scene.chest)
    hu, back = scene.hu, _dorsal(scene)
    # Chances first, so that one confounder never changes the draw of the next.
    chance, size = rng.random(10), rng.random(10)
    streams = rng.spawn(10)
    if chance[0] < 0.6:  # dependent atelectasis: a band along the back, worse at the base
        veil = np.clip(1 - scene.inner / (3 + 13 * size[0]), 0, 1) * np.clip((back - 0.55) / 0.3, 0, 1)
        _add(scene, veil * (1 + 0.5 * scene.field(streams[0], 9)), 100 + 420 * size[0] ** 2)
    if chance[1] < 0.36:  # bullae: thin-walled air under the pleura, a mimic of pneumothorax
        _bullae(scene, streams[1], 1 + int(6 * size[1] ** 2))
    if chance[2] < 0.14 and (at := _pick(scene, streams[2], lambda wall: wall > 4)) is not None:  # calcified granuloma
        r, bumps = 1.5 + 2 * size[2], streams[2].normal(0, 0.05, (2, 2))
        _blob(scene, ellipse(*at, r, r, 0, bumps), 480 + 400 * streams[2].random())
    if chance[3] < 0.75:  # oblique fissures
        _fissures(scene, streams[3])
    if chance[4] < 0.03 and scene.level < 0.35:  # azygos fissure
        h = scene.hilum[0]
        line = np.array([(h[0] - 2, h[1] - 25), (h[0] - 26, h[1] - 12), (h[0] - 24, h[1] + 18), (h[0] - 4, h[1] + 34)])
        _add(scene, scene.tubes(smooth_contour(line, 80, closed=False), 0.75, 0.2), 300)
    if chance[5] < 0.12:  # a small effusion behind
        side = scene.x * (1 if streams[5].random() < 0.5 else -1) > 0
        layer = np.clip(((3 + 9 * size[5]) * np.clip((back - 0.62) / 0.38, 0, 1) - scene.wall) / 1.2 + 0.5, 0, 1) * side
        _mix(scene, np.where(back > 0.62, layer, 0), 12.0)
    at = _pick(scene, streams[6], lambda wall: (wall > 2) & (wall < 30)) if chance[6] < 0.3 else None
    if at is not None:  # a plate of atelectasis or a scar
        way = streams[6].uniform(0, np.pi)
        t = np.linspace(-1, 1, 120)[:, None] * (6 + 14 * size[6])
        bow = np.array([(-np.sin(way), np.cos(way))]) * (t / 12) ** 2 * streams[6].normal(0, 2)
        _add(scene, scene.tubes(at + t * (np.cos(way), np.sin(way)) + bow, 0.5 + size[6], 0.2), 450)
    if chance[7] < 0.3:  # air trapping: patches of darker lung
        _add(scene, np.clip(scene.field(streams[7], 30) - 0.5, 0, 0.7), -35 - 30 * size[7])
    if chance[8] < 0.4:  # patches of slightly denser lung (low inspiration, perfusion)
        _add(scene, np.clip(scene.field(streams[8], 34) - 0.3, 0, 1), 30 + 90 * size[8])
    np.maximum(hu, -1024, out=hu)


def add_finding(scene: Scene, finding: str, severity: float, rng: np.random.Generator) -> dict:
    """Draw the finding of one class into the scene.

    Args:
        scene: anatomy with confounders; `scene.hu` is changed.
        finding: ILD, Lung_Cancer, pneumonia, pneumothorax, or Normal / none, which draw nothing.
        severity: 0 subtle .. 1 gross.
        rng: the finding's own stream.
    Returns:
        finding (the sign drawn), side (right, left, both or ""), mask bool (size, size) of the finding.
    """
    draw = {"ILD": _ild, "Lung_Cancer": _cancer, "pneumonia": _pneumonia, "pneumothorax": _pneumothorax}.get(finding)
    mask, part = np.zeros(scene.hu.shape, dtype=bool), scene.part(scene.chest)
    drawn = draw(part, severity, rng) if draw else None
    if drawn is None:  # nothing to draw, or no place for it
        return {"finding": "", "side": "", "mask": mask}
    sign, mask[scene.chest] = drawn
    right, left = (np.count_nonzero(drawn[1] & (part.x * way > 0)) for way in (-1, 1))
    side = "both" if min(right, left) > 0.15 * max(right, left) else ("right" if right > left else "left")
    return {"finding": sign, "side": side if mask.any() else "", "mask": mask}


def _dorsal(scene: Scene) -> np.ndarray:
    """Return 0 at the front of the lungs .. 1 at their back, float32."""
    ys = np.concatenate([s[:, 1] for s in scene.sides])
    return np.clip((scene.y - ys.min()) / (ys.max() - ys.min()), 0, 1).astype(np.float32)


def _mix(scene: Scene, share: np.ndarray, value) -> None:
    """Replace lung by `value` HU where `share` is 1."""
    share = np.clip(share, 0, 1) * scene.lung
    scene.hu += (share * (value - scene.hu)).astype(np.float32)


def _add(scene: Scene, share: np.ndarray, amount: float) -> None:
    """Add density to lung; vessels and walls stay at least as dense as they were."""
    room = np.clip((60 - scene.hu) / 900, 0, 1)  # dense tissue cannot become denser by filling air
    scene.hu += (np.clip(share, 0, 1.3) * scene.lung * amount * room).astype(np.float32)


def _pick(scene: Scene, rng, where=None, side: int = 0):
    """Return a random point (2,) in mm in the lung with `where(mm from the wall)`, or None."""
    rng = rng.spawn(1)[0]  # by rejection, from a stream of its own: so little depends on the number of pixels
    for _ in range(400):
        s = scene.sides[rng.integers(2) if side == 0 else (0 if side < 0 else 1)]
        at = rng.uniform(s.min(0), s.max(0))
        row, col = scene.nearest(at)
        inside = 0 <= row < scene.lung.shape[0] and 0 <= col < scene.lung.shape[1]
        if inside and scene.lung[row, col] > 0.95 and (where is None or where(scene.wall[row, col])):
            return at
    return None


def _blob(scene: Scene, contour: np.ndarray, value: float) -> None:
    """Fill a contour (N, 2) with `value` HU where there is lung."""
    window, share = scene.grid.coverage(contour)
    lung = scene.whole.lung[window]
    fill(scene.whole.hu, window, share * (lung > 0.02) * np.minimum(1, lung * 1.3), value)


def _pushed(picture: np.ndarray, grid: Grid, win: Window, x, y) -> np.ndarray:
    """Return a window of a picture in which every pixel shows what lies (x, y) mm from it, in the patient's axes."""
    c, s = np.cos(grid.angle), np.sin(grid.angle)
    row = np.arange(win[0].start, win[0].stop)[:, None] + (s * x + c * y) / grid.pixel
    col = np.arange(win[1].start, win[1].stop)[None, :] + (c * x - s * y) / grid.pixel
    return ndimage.map_coordinates(picture, [row, col], order=1, mode="nearest")


def _fissures(scene: Scene, rng) -> None:
    back = np.interp(scene.level, [0.1, 0.5, 1.0], [0.75, 0.35, -0.35])
    for side, contour in zip((-1, 1), scene.sides, strict=True):
        low, high, t = contour.min(0), contour.max(0), np.linspace(-1, 1, 400)
        mid, half = (low + high) / 2, (high - low) / 2
        bow = back + rng.normal(0, 0.1) - rng.uniform(-0.15, 0.2) * (1 - t**2)
        path = np.column_stack([mid[0] + t * half[0], mid[1] + bow * half[1] + t * side * 8])
        _add(scene, scene.tubes(path, rng.uniform(0.35, 0.6), 0.2), rng.uniform(120, 260))


def _bullae(scene: Scene, rng, count: int) -> None:
    around = _pick(scene, rng, lambda wall: wall < 18)
    if around is None:
        return
    giant = rng.uniform(8, 26) if rng.random() < 0.4 else 0.0  # now and then one as wide as a crescent
    for k in range(count):
        r = min(rng.gamma(2.2, 2.6) + 2.5 + giant * (k == 0), 38)
        at = around + rng.normal(0, 1, 2) * (0 if k == 0 else 12)
        shape = ellipse(*at, r, r * rng.uniform(0.6, 1), rng.uniform(0, 3), rng.normal(0, 0.06, (3, 2)))
        _blob(scene, shape, -780.0)
        _blob(scene, at + (shape - at) * (1 - 1.0 / r), scene.patient.gas + 6)


def _ild(scene: Scene, severity: float, rng):
    """Interstitial lung disease: reticulation under the pleura, worse behind and at the base.

    With it ground glass, traction bronchiectasis and, when severe, honeycombing (ATS/ERS/JRS/ALAT 2022,
    https://doi.org/10.1164/rccm.202202-0399ST). Few signs at the apex, as in life.
    """
    kind = rng.random()  # below 0.5: UIP with honeycombing; then NSIP-like with more ground glass
    back = _dorsal(scene)
    extent = (3.5 + 13.5 * severity) * (0.7 + 0.5 * scene.level)
    clouds = scene.field(rng, 24)
    zone = np.clip((extent - scene.inner - 5 * clouds + 6 * (back - 0.5)) / 5 + 0.5, 0, 1) * (scene.wall < 60)
    zone *= np.clip(0.35 + 0.9 * back + 0.25 * clouds, 0, 1)
    mesh_scale = rng.uniform(4.0, 6.0)
    fine = scene.field(rng, mesh_scale) + 0.6 * scene.field(rng, mesh_scale * 0.6)
    other = scene.field(rng, mesh_scale) + 0.6 * scene.field(rng, mesh_scale * 0.6)
    lines = np.maximum(np.exp(-((fine / 0.20) ** 2)), 0.9 * np.exp(-((other / 0.17) ** 2)))
    _add(scene, zone, (35 + 115 * severity) * (0.6 if kind < 0.5 else 1.3))
    _add(scene, zone * lines, 190 + 360 * severity)
    sign = "reticulation" if kind < 0.5 else "reticulation with ground glass"
    if kind < 0.5 and severity > 0.35:
        sign, depth = "honeycombing", 4 + 8 * severity
        comb = np.clip((depth - scene.inner - 3 * clouds + 6 * (back - 0.6)) / 1.5, 0, 1) * (scene.wall < 40)
        comb *= np.clip((back - 0.35) / 0.15 + clouds, 0, 1)
        rows, cols = np.nonzero((comb > 0.02) & (scene.lung > 0.02))
        if len(rows) > 20:
            n = int((2 * scene.patient.half_width / rng.uniform(4.0, 6.5)) ** 2 * 1.2)
            seeds = rng.uniform(-1, 1, (n, 2)) * scene.patient.half_width
            near, _ = cKDTree(seeds).query(np.column_stack([scene.x[rows, cols], scene.y[rows, cols]]), k=2)
            wall = np.clip(1.25 - (near[:, 1] - near[:, 0]) / 1.5, 0, 1)  # 1 between two cysts
            value = -940 + wall * (880 - 120 * rng.random())
            share = comb[rows, cols] * scene.lung[rows, cols]
            scene.hu[rows, cols] += (share * (value - scene.hu[rows, cols])).astype(np.float32)
    if severity > 0.3:  # traction bronchiectasis: wide, beaded airways inside the diseased zone
        for _ in range(int(rng.integers(4, 9) + 6 * severity)):
            at = _pick(scene, rng, lambda wall: (wall > 5) & (wall < 10 + extent))
            if at is None or zone[scene.nearest(at)] < 0.3:
                continue
            side = scene.hilum[0 if at[0] < 0 else 1]
            way = (at - side) / max(np.linalg.norm(at - side), 1) + rng.normal(0, 0.3, 2)
            t = np.linspace(-1, 1, 50)
            path = at + np.outer(t * rng.uniform(3, 9), way) + np.outer(t**2, rng.normal(0, 2, 2))
            r = rng.uniform(0.7, 1.3) * (1 + 0.3 * np.sin(t * rng.uniform(4, 8)))
            _mix(scene, scene.tubes(path, r + 0.8, 0.5), -250.0)
            _mix(scene, scene.tubes(path, r, 0.5), -960.0)
    return sign, (zone > 0.3) & (scene.lung > 0.5)


def _cancer(scene: Scene, severity: float, rng):
    """Lung cancer: one nodule or mass of 8 to 40 mm, lobulated or spiculated."""
    grid, r = scene.grid, 4.8 + 14.5 * severity**1.15
    at = _pick(scene, rng, lambda wall: wall > min(r * 0.4 + 2, 12))
    if at is None:
        return None
    solid = rng.uniform(15, 60) + 0.18 * scene.patient.contrast
    part_solid, cavity = rng.random() < 0.2, rng.random() < 0.12 and r > 6
    spiculated = rng.random() < 0.62
    bumps = np.column_stack([rng.normal(0, 1, 5) * np.array([0.09, 0.07, 0.05, 0.035, 0.03]), rng.uniform(0, 6.3, 5)])
    shape = ellipse(*at, r * rng.uniform(0.85, 1.2), r * rng.uniform(0.8, 1.05), rng.uniform(0, 3), bumps)
    mask = grid.mask(shape)[scene.window]
    sign = ("spiculated" if spiculated else "lobulated") + (" nodule" if r < 15 else " mass")
    if part_solid:
        sign = "part-solid nodule"
        halo = ndimage.gaussian_filter(grid.mask(at + (shape - at) * 1.35), 1.2 / grid.pixel)[scene.window]
        _add(scene, halo * (0.85 + 0.25 * scene.field(rng, 4)), rng.uniform(260, 400))
        shape = at + (shape - at) * 0.6 + rng.normal(0, 0.1 * r, 2)
    if spiculated:
        t, paths, radii = np.linspace(0, 1, 40), [], []
        for angle in np.sort(rng.uniform(0, 2 * np.pi, rng.integers(9, 18))):
            way, side = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
            along = 0.72 * r + t * (r * rng.uniform(0.35, 0.95) + 2.0)
            paths.append(at + np.outer(along, way) + np.outer(t**2, side * rng.normal(0, 1.5)))
            radii.append(rng.uniform(0.6, 1.1) * (1.1 - t))
        _mix(scene, 0.85 * scene.tubes(np.vstack(paths), np.concatenate(radii), 0.3), solid - 40)
    if rng.random() < 0.4:  # pleural tag
        way = at * (1, 0.4) / max(np.linalg.norm(at * (1, 0.4)), 1)
        path = at + np.outer(np.linspace(0, 1, 80) * min(scene.wall[scene.nearest(at)] + 2, 28), way)
        _mix(scene, 0.8 * scene.tubes(path, 0.7, 0.3), 0.0)
        sign += " with pleural tag"
    window, share = grid.coverage(shape)
    share, grain, hu = share * np.minimum(1, scene.whole.lung[window] * 1.2), grid.field(rng, 5), scene.whole.hu
    fill(hu, window, share, lambda at: np.maximum(solid + 12 * grain(at), hu[at] * 0.2))
    if cavity and not part_solid:
        sign = "cavitating " + sign
        _blob(scene, at + (shape - at) * rng.uniform(0.4, 0.62) + rng.normal(0, 0.08 * r, 2), -940.0)
    return sign, (mask > 0.3) & (scene.lung > 0.2)


def _pneumonia(scene: Scene, severity: float, rng):
    """Pneumonia: lobar or patchy consolidation with air bronchograms, ground glass, tree-in-bud."""
    grid, kind, side = scene.grid, rng.choice(3, p=[0.45, 0.25, 0.30]), int(rng.choice([-1, 1]))
    at = _pick(scene, rng, lambda wall: (wall > 5) & (wall < 45), side)
    if at is None:
        return None
    size, hilum = 15 + 26 * severity, scene.hilum[0 if side < 0 else 1]
    clouds, grain = scene.field(rng, 16), scene.field(rng, 6)
    far = np.hypot((scene.x - at[0]), (scene.y - at[1]) * rng.uniform(0.8, 1.3))
    same_side = (scene.x * side > 0).astype(np.float32)
    if kind == 0:  # consolidation: dense, with a ragged edge of ground glass
        edge = (size - far) + 6 * clouds + 2.5 * grain
        cut = rng.uniform(0, 2 * np.pi)  # a lobe ends at its fissure: one straight side
        along = (scene.x - at[0]) * np.cos(cut) + (scene.y - at[1]) * np.sin(cut)
        edge = np.minimum(edge, (0.6 * size - along) * 2 + 3 * clouds)
        dense, halo = (np.clip(share, 0, 1) * same_side for share in (edge / 4, (edge + 9) / 10))
        _add(scene, halo, 200 + 160 * severity)
        value = rng.uniform(5, 45) + 0.12 * scene.patient.contrast
        _mix(scene, dense * np.clip(0.80 + 0.16 * grain + 0.2 * severity, 0.5, 1), value)
        # Air bronchograms: the airways stay open in the dense lung.
        start, ends = [*(at + (hilum - at) * 0.45), 0.0], at + rng.normal(0, 11, (14, 2)) + (at - hilum) * 0.12
        airways = Forest()
        airways.plant(rng, start, np.column_stack([ends, rng.normal(0, 2.5, 14)]))
        _mix(scene, scene.tubes(*airways.sample(0.75, 0.30, 0.6)[:3]) * np.clip(dense * 1.5 - 0.2, 0, 1), -900.0)
        return "consolidation with air bronchograms", (halo > 0.4) & (scene.lung > 0.5)
    if kind == 1:  # patchy ground glass in several lobules
        field = np.zeros_like(scene.hu)
        for _ in range(rng.integers(2, 5)):
            spot = _pick(scene, rng, None, side if rng.random() < 0.65 else -side)
            if spot is not None:
                d = np.hypot(scene.x - spot[0], scene.y - spot[1]) - rng.uniform(0.45, 0.9) * size
                field = np.maximum(field, np.clip((6 * clouds + 2 * grain - d) / 6, 0, 1))
        _add(scene, field * (0.85 + 0.2 * grain), 190 + 220 * severity)
        return "patchy ground glass", (field > 0.4) & (scene.lung > 0.5)
    # Tree-in-bud: short branching twigs with buds around the ends of the airways.
    patch, twigs, buds, radii = np.zeros_like(scene.hu), Forest(), [], []
    if severity > 0.25:  # with some ground glass around
        patch = np.clip((size * 0.75 - far + 7 * clouds + 3 * grain) / 7, 0, 1) * same_side
        _add(scene, patch, 120 + 180 * severity)
    for _ in range(int(14 + 34 * severity)):
        spot = at + rng.normal(0, size * 0.6, 2)
        way = spot - hilum
        ends = spot + rng.normal(0, 2.2, (4, 2)) + 4.5 * way / max(np.linalg.norm(way), 1)
        twigs.plant(rng, [*spot, 0.0], np.column_stack([ends, rng.normal(0, 0.4, 4)]))
        buds.append(ends)
        radii.append(rng.uniform(0.8, 1.6, 4))
    field = grid.tubes(*twigs.sample(0.5, 0.3, 0.6)[:3])
    field = np.maximum(field, grid.tubes(np.vstack(buds), np.concatenate(radii), 0.5))
    field *= scene.whole.x * side > 0
    around = ndimage.gaussian_filter(field, 2 / grid.pixel)[scene.window]
    _mix(scene, field[scene.window] * (0.55 + 0.2 * severity), 0.0)
    return "tree-in-bud", ((around > 0.12) | (patch > 0.5)) & (scene.lung > 0.5)


def _pneumothorax(scene: Scene, severity: float, rng):
    """Pneumothorax: air in front between chest wall and lung, the visceral pleura as a thin line.

    The lung's own picture is pressed toward the hilum, so that it is smaller, denser and its vessels crowded;
    when large, the mediastinum moves to the other side.
    """
    grid, whole, k = scene.grid, scene.whole, int(rng.integers(2))
    side, hilum, contour = (-1, 1)[k], scene.hilum[k], scene.sides[k]
    thick = (3.5 + 30 * severity**1.8) * (1.15 - 0.35 * scene.level)
    # Gas lies where the lung lets it: in front, as the patient lies on the back, less at the side.
    dx, dy = whole.x - hilum[0], whole.y - hilum[1]
    far = np.maximum(np.hypot(dx, dy), 1e-3)
    up, out = -dy / far, side * dx / far
    reach = np.clip(0.15 + 0.75 * up + rng.uniform(0.15, 0.75) * out, 0, 1.2) + 0.10 * whole.field(rng, 60)
    width = (thick * np.clip(reach, 0, 1.2)).astype(np.float32)
    most = np.clip(width.max() / 40, 0, 1)
    if thick > 17:
        _shift_mediastinum(whole, -side * min(14.0, 0.9 * (thick - 15)))
    dx, dy, far, width, own = (v[scene.window] for v in (dx, dy, far, width, grid.mask(contour) > 0.5))
    own = own & (scene.lung > 0.02)
    if np.count_nonzero(own) < 50:
        return None
    gas = np.clip((width - scene.wall) / (0.8 * grid.pixel) + 0.5, 0, 1) * (width > 1.0) * own

    # Press the lung: a point at the new edge shows what lay at the chest wall.
    share = np.clip(far / np.maximum(far + scene.wall - width, 1), 0, 1)  # the wall stands about far + wall away
    push = width * share
    pressed = _pushed(whole.hu, grid, scene.window, push * dx / far, push * dy / far)
    # Where the pressed picture would show the chest wall, keep the lung's own density.
    plain = np.minimum(pressed, np.where(share > 0.93, scene.patient.lung + 60, 3000))
    left = own * (1 - gas)
    scene.hu += left * scene.lung * (plain - scene.hu)
    _add(scene, np.clip((scene.hu + 1000) / 200, 0, 1) * left * most, 40 + 210 * severity)
    _mix(scene, gas, scene.patient.gas + 4)
    line = np.exp(-(((scene.wall - width) / max(0.75, 0.6 * grid.pixel)) ** 2)) * (width > 2.0) * own
    _mix(scene, 0.62 * line, -60.0)
    return ("large " if thick > 25 else "") + "pneumothorax", (gas > 0.5) & (scene.lung > 0.5)


def _shift_mediastinum(scene: Scene, way: float) -> None:
    """Move heart, great vessels and airways by `way` mm to the side; spine and chest wall stay."""
    win = window_of(scene.wall)
    x, y = scene.x[win], scene.y[win]
    front = scene.hilum[:, 1].mean() + 0.12 * scene.patient.half_depth  # the spine begins behind this
    share = np.clip(scene.wall[win] / 25, 0, 1) * np.exp(-((x / 60) ** 2)) * np.clip((front - y) / 15 + 0.5, 0, 1)
    for picture in (scene.hu, scene.lung):
        picture[win] = _pushed(picture, scene.grid, win, -way * share, 0 * share)
