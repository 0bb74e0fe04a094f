"""Stage 3 of the phantom: from HU to the 8-bit picture, by one model of the scanner for every class."""

from types import SimpleNamespace

import numpy as np
from scipy import fft

from ctutils.phantom.shapes import Grid

LUNG_WINDOW = (-600, 1500)  # level and width, HU; air outside the body becomes grey 55
AIR = -1024.0


class Scanner(SimpleNamespace):
    """How the slice is taken; drawn from the same distributions for every class."""

    @staticmethod
    def draw(rng: np.random.Generator, sharpness: float | None = None) -> "Scanner":
        """Draw a scanner; `sharpness` in [0, 1] fixes the kernel instead (0 soft, 1 sharp)."""
        kernel = rng.random()
        kernel = kernel if sharpness is None else sharpness
        moved, far, way = rng.random() < 0.25, rng.uniform(0.6, 2.2), rng.uniform(0, 2 * np.pi)
        return Scanner(
            blur=0.80 - 0.38 * kernel,  # sd of the point spread, mm
            boost=0.35 * kernel**2,  # edge enhancement of the kernel
            noise=rng.uniform(9, 19) * (0.85 + 0.9 * kernel),  # sd in soft tissue of a middle-sized body, HU
            grain=0.62 - 0.34 * kernel,  # sd of the noise's own correlation, mm
            streak=rng.gamma(1.2, 4.0),  # streaks from shoulders and bones, HU
            motion=(far * np.cos(way), far * np.sin(way)) if moved else (0.0, 0.0),  # a second exposure, mm away
            drift=rng.uniform(2, 7),  # slow shading, HU
            lung_noise=rng.uniform(0.45, 0.85),  # noise in air against noise in soft tissue
        )


def acquire(
    hu: np.ndarray,
    grid: Grid,
    skin: np.ndarray,
    scanner: Scanner,
    rng: np.random.Generator,
    window: tuple[float, float] = LUNG_WINDOW,
) -> np.ndarray:
    """Scan a slice: blur, motion, noise that grows with the body, streaks, table removal, window.

    Args:
        hu: float32 (size, size).
        grid: the pixels.
        skin: contour of the body in mm; all outside it is exactly air.
        scanner: kernel, dose and motion.
        rng: the acquisition's own stream.
        window: level and width in HU.
    Returns:
        uint8 (size, size); in the lung window air outside the body is 55.
    """
    body, share = grid.coverage(skin * 1.004)  # nothing outside this window is seen
    hu, pad = hu[body], 8
    (rows, cols), shape = hu.shape, [fft.next_fast_len(n + 2 * pad, real=True) for n in hu.shape]
    seen = (slice(pad, pad + rows), slice(pad, pad + cols))
    fx = fft.rfftfreq(shape[1], grid.pixel)[None, :].astype(np.float32)
    fy = fft.fftfreq(shape[0], grid.pixel)[:, None].astype(np.float32)
    f2 = fx**2 + fy**2
    edge = scanner.boost * f2 / (0.25 + f2)
    mtf = np.exp(-2 * np.pi**2 * scanner.blur**2 * f2) * (1 + 4 * edge)
    if scanner.motion != (0.0, 0.0):
        mtf *= np.cos(np.pi * (fx * scanner.motion[0] + fy * scanner.motion[1]))
    padded = np.pad(hu, [(pad, m - n - pad) for m, n in zip(shape, hu.shape, strict=True)], mode="edge")
    sharp = fft.irfft2(fft.rfft2(padded) * mtf, s=shape)[seen]

    # Noise: a ramp at low frequencies (filtered back-projection), cut off by the kernel.
    power = (0.04 + np.sqrt(f2)) * np.exp(-2 * np.pi**2 * scanner.grain**2 * f2) * (1 + 2 * edge)
    noise = fft.irfft2(fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * power, s=shape)[seen]
    # More tissue along the beam means fewer photons: row by row and column by column, in units of 1000 HU.
    tissue = np.clip(hu + 1000, 0, 1400) / 1000
    across, down = tissue.sum(1) * grid.pixel / 200, tissue.sum(0) * grid.pixel / 150
    load = np.clip(np.sqrt(0.35 + 0.75 * across[:, None] * down[None, :]), 0.5, 1.6)
    noise /= noise.std()
    noise *= load * (scanner.lung_noise + (1 - scanner.lung_noise) * np.minimum(tissue, 1))
    sharp += noise * scanner.noise
    lines = np.convolve(rng.standard_normal(rows + 8), np.ones(3) / np.sqrt(3), "same")[4 : rows + 4]
    lines *= scanner.streak * np.clip(across - 0.75, 0, 1)
    fade = np.interp(np.linspace(0, 5, cols), np.arange(6), 0.5 + 0.5 * np.tanh(rng.standard_normal(6)))
    sharp += np.outer(lines, fade).astype(np.float32)
    sharp += scanner.drift * np.sin(grid.pixel * np.arange(rows) / 120 + rng.uniform(0, 6)).astype(np.float32)[:, None]

    def grey(hu, level=window[0], width=window[1]):
        return np.clip(np.rint((hu - level + width / 2) / width * 255), 0, 255).astype(np.uint8)

    picture = np.full((grid.size, grid.size), grey(np.float32(AIR)))
    picture[body] = grey(np.where(share > 0.02, np.clip(sharp, AIR, 3071), np.float32(AIR)))
    return picture
