"""The gate for DICOM: what is an axial CT slice in HU, and its grey levels; all else is refused with its reason."""

import io
import math
import re
from pathlib import Path

import numpy as np

from ctutils.pictures import (
    AIR_HU,
    HU,
    LUNG_WINDOW,
    MOST_PIXELS,
    SMALLEST,
    BadFile,
    blamed,
    read_file,
    window_to_grey,
)

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
MOST_VOXELS = 1 << 28  # of all frames of a DICOM file: 1,024 of 512 x 512
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"  # CT Image Storage; the enhanced ones begin with it
DEFLATED = b"1.2.840.10008.1.2.1.99"
PATIENT_KEYS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
NOT_AXIAL = set("LOCALIZER SCOUT TOPOGRAM CORONAL SAGITTAL MIP MINIP VRT SSD DOSE SCREEN PROJECTION".split())


def is_dicom(head: bytes, name: str) -> bool:
    """Tell a DICOM file by its first 132 bytes or its name."""
    return head[128:132] == b"DICM" or name.lower().endswith(DICOM_SUFFIXES)


def read_dicom(source, window: tuple[float, float] = LUNG_WINDOW) -> tuple[np.ndarray, dict[str, str]]:
    """Read axial CT slices as grey levels in a HU window, and the header's words about the patient.

    MONOCHROME1 (low values shown white) is inverted. Padding outside the scanned circle becomes air,
    and so does whatever is below -1024 HU. Old files without the "DICM" mark are implicit little endian.

    Args:
        source: path or bytes of a DICOM file, or a pydicom Dataset.
        window: level and width in HU.
    Returns:
        uint8 (frames, H, W); {PatientID, StudyInstanceUID, SeriesInstanceUID, PatientName}, "" where unknown.
    Raises:
        BadFile: no axial CT slice in HU, not a grey picture, too large, or it cannot be read and decoded.
    Source: DICOM PS3.3, C.7.6.2 (orientation), C.7.6.3 (pixels), C.7.5.1.1.2 (padding), C.11.1 (Modality LUT).
    """
    import pydicom

    with blamed():
        dataset = source
        if not isinstance(source, pydicom.Dataset):
            content = read_file(source) if isinstance(source, str | Path) else source
            if DEFLATED in content[:4096]:  # would be unpacked whole, however large
                raise BadFile("deflated DICOM, which is not opened")
            dataset = pydicom.dcmread(io.BytesIO(content), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        _refuse_other(dataset)
        words = {key: str(dataset.get(key) or "").strip() for key in (*PATIENT_KEYS, "PatientName")}
        return _dicom_grey(dataset, window), words


def _refuse_other(dataset) -> None:
    """Raise BadFile for what is no axial CT slice in HU, from the header alone."""
    kind, modality = str(dataset.get("SOPClassUID") or ""), dataset.get("Modality") or ""
    said = {*re.split(r"[_ ]", " ".join(map(str, dataset.get("ImageType") or [])).upper())} & NOT_AXIAL
    if "PixelData" not in dataset or (modality or "CT") != "CT" or said or not (kind or modality):
        what = f"modality {modality or 'unknown'}{''.join(f', {word}' for word in sorted(said))}"
        raise BadFile(f"no CT slice ({what}{'' if 'PixelData' in dataset else ', no picture'})")
    if kind and not f"{kind}.".startswith(f"{CT_CLASS}."):
        raise BadFile(f"no CT slice (kind '{dataset['SOPClassUID'].value.name}')")
    if dataset.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadFile(f"'{dataset.get('PhotometricInterpretation')}' pixels, not grey")
    rows, columns, frames = (int(dataset.get(key) or 1) for key in ("Rows", "Columns", "NumberOfFrames"))
    voxels = rows * columns * frames
    if min(rows, columns) < SMALLEST or rows * columns > MOST_PIXELS or not 0 < voxels <= MOST_VOXELS:
        raise BadFile(f"{frames} frame(s) of {columns} x {rows} pixels")
    if "ModalityLUTSequence" in dataset:
        raise BadFile("a table (Modality LUT) instead of a rescale to HU")
    for frame in range(frames if "PerFrameFunctionalGroupsSequence" in dataset else 1):
        _rescale(dataset, frame)
        axes = _group(dataset, frame, "PlaneOrientationSequence").get("ImageOrientationPatient")
        # Of a tilted gantry, which stays below 37 degrees, the product is above 0.8.
        if axes and (len(axes) != 6 or not abs(axes[0] * axes[4] - axes[1] * axes[3]) > 0.8):
            raise BadFile("not axial (its orientation is coronal, sagittal or oblique)")


def _group(dataset, frame: int, name: str):
    """Return what holds a frame's values: an enhanced CT's functional group, per frame or shared, or the file."""
    groups = [*dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]]
    groups += dataset.get("SharedFunctionalGroupsSequence", [])
    return next((holder for group in groups for holder in group.get(name, [])), dataset)


def _rescale(dataset, frame: int) -> tuple[float, float]:
    """Return slope and intercept to HU."""
    holder = _group(dataset, frame, "PixelValueTransformationSequence")
    values = [holder.get(key) for key in ("RescaleSlope", "RescaleIntercept")]
    try:
        slope, intercept = (math.nan if value in (None, "") else float(value) for value in values)
    except (TypeError, ValueError):  # several values, or no number
        slope = intercept = math.nan
    unit = holder.get("RescaleType") or HU
    if slope == 0 or not math.isfinite(slope + intercept) or unit not in (HU, "US"):
        raise BadFile(f"no rescale to HU (slope {values[0]}, intercept {values[1]}, unit {unit})")
    return slope, intercept


def _dicom_grey(dataset, window: tuple[float, float]) -> np.ndarray:
    raw = dataset.pixel_array
    raw = raw[None] if raw.ndim == 2 else raw
    padding = [dataset.get(key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if padding[0] is not None:  # signed values are often stored as unsigned: 63536 means -2000
        limits = [int(value) for value in padding if value is not None]
        top = 1 << int(dataset.BitsAllocated)
        if dataset.PixelRepresentation:
            limits = [value - top if value >= top // 2 else value for value in limits]
    grey = np.empty(raw.shape, np.uint8)
    for index, frame in enumerate(raw):  # one at a time, so that only one is held as float
        slope, intercept = _rescale(dataset, index)
        hu = frame * np.float32(slope) + np.float32(intercept)
        # Some files fill the corners with -2048 and do not say so: black corners would betray the scanner.
        grey[index] = window_to_grey(np.maximum(hu, AIR_HU), window)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            grey[index] = 255 - grey[index]
        if padding[0] is not None:
            outside = (frame >= min(limits)) & (frame <= max(limits))
            grey[index][outside] = window_to_grey(np.array(AIR_HU), window)
    return grey
