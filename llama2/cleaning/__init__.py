"""Cleaning of plain text before tokenization: one document at a time (`Cleaner`), against
evaluation sets (`Decontamination`), and over a whole corpus (near-duplicates, on disk)."""

from llama2.cleaning.cleaner import PERSONAL, Cleaned, Cleaner
from llama2.cleaning.contamination import Decontamination
from llama2.cleaning.near_duplicates import (
    BUCKETS,
    cluster_duplicates,
    duplicates,
    find_duplicates,
    write_signatures,
)
from llama2.cleaning.normalization import normalize
from llama2.cleaning.settings import CleaningSettings

__all__ = [
    "BUCKETS",
    "PERSONAL",
    "Cleaned",
    "Cleaner",
    "CleaningSettings",
    "Decontamination",
    "cluster_duplicates",
    "duplicates",
    "find_duplicates",
    "normalize",
    "write_signatures",
]
