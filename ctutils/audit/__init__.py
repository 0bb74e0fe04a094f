"""Can a score on this folder be trusted? Unreadable files, leaks between splits, shortcuts, a cleaned copy.

`look` decodes every slice once; `duplicates` and `probes` work on what it kept; `report` puts it together and
`clean` mends it.
"""

# ruff: noqa: F401
from ctutils.audit.clean import clean_copy
from ctutils.audit.duplicates import exact_duplicates, group_sketches, group_slices, near_duplicates
from ctutils.audit.look import decode_pass, sketch
from ctutils.audit.probes import doubted_labels, shortcut_probes
from ctutils.audit.report import AuditReport, audit, stored_verdicts
