"""What Kaggle's data sets need: the download, and one name for a class whose folders differ between splits."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ctutils.base import CTError, answers

PREFIX = "kaggle:"
SERVER = "https://api.kaggle.com"
SECONDS = 6.0  # how long the server may take to answer at all
BY_HAND = "or download it with a browser and import the .zip"


def fetch(source: str) -> Path:
    """Download a public data set with `kagglehub`, once; return its folder in that package's cache.

    Args:
        source: `kaggle:OWNER/NAME`, or `kaggle:OWNER/NAME/versions/N`.
    Raises:
        CTError: no such address; the package is not installed; no answer within seconds; Kaggle refuses.
    """
    handle = source.replace("\\", "/").removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/versions/\d+)?", handle, re.ASCII):
        raise CTError(f"'{source}'", "kaggle:OWNER/NAME", "copy both from the data set's address on kaggle.com")
    try:
        import kagglehub
    except ImportError as error:
        mend = f"run pip install kagglehub, {BY_HAND}"
        raise CTError("no package kagglehub", "it, to download from Kaggle", mend) from error
    if "/versions/" not in handle and not answers(SERVER, SECONDS):  # a version may be in the cache
        mend = f"connect to the network, {BY_HAND}"
        raise CTError(f"no answer from Kaggle within {SECONDS:g} s", "a network that reaches kaggle.com", mend)
    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # its own classes are not the same in all versions
        why = " ".join(str(error).split())[:200] or type(error).__name__
        mend = f"check the name, log in if the data set asks for it (kagglehub.login), {BY_HAND}"
        raise CTError(f"no download of '{handle}' ({why})", "a public data set of Kaggle", mend) from error


def same_names(kinds: Iterable[tuple[str | None, str]]) -> dict[str, str]:
    """Return {long name: short name} for classes that one split spells longer than another.

    `adenocarcinoma_left.lower.lobe_T2_N0` in train is `adenocarcinoma` in test: the long name begins with the short
    one and a separator, no split has both, and no split has two long names for one short one.

    Args:
        kinds: (split, class) of every folder.
    """
    splits: dict[str | None, set[str]] = {}
    for split, label in kinds:
        splits.setdefault(split, set()).add(label)
    labels, names = set().union(*splits.values()), {}
    for label in labels:
        shorter = [other for other in labels if re.match(re.escape(other) + r"[_ .-]+\w", label)]
        shorter = [other for other in shorter if not any({label, other} <= found for found in splits.values())]
        if shorter:
            names[label] = min(shorter, key=len)
    for found in splits.values():
        several = Counter(names[label] for label in found if label in names)
        names = {label: name for label, name in names.items() if label not in found or several[name] == 1}
    return dict(sorted(names.items()))
