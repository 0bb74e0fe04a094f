# ruff: noqa: F401
"""Synthetic axial chest CT slices of five classes, made from scratch: no patient, no download.

Three stages with pictures in Hounsfield units between them: `anatomy` draws a healthy body, `findings` adds what is
wrong, `acquisition` scans it to 8 bit. `dataset` numbers the slices and writes folders of them.
"""

from ctutils.phantom.acquisition import Scanner, acquire
from ctutils.phantom.anatomy import Patient, Scene, draw_anatomy
from ctutils.phantom.dataset import CLASSES, class_counts, make_slice, patient_of, write_dataset
from ctutils.phantom.findings import add_confounders, add_finding
from ctutils.phantom.shapes import Grid
