"""Shared helpers of the chest CT transfer-learning course. Not for clinical use.

Importing the package is cheap and has no side effects; import what you need from its modules.
"""

__version__ = "0.1.0"
