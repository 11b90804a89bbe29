"""The C ABI of csrc/mcheads.h through ctypes: declarations and nothing else."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path

WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "auto": 2}
MODES = {"exact": 0, "hybrid": 1}
TOP_CLASSES = 32
"""MCHEADS_TOP of the header."""

_POINTER = ctypes.c_void_p
_INT = ctypes.c_int
_LONG = ctypes.c_int64


class Counts(ctypes.Structure):
    """mcheads_counts of the header."""

    _fields_ = [
        ("runs", ctypes.c_uint64),
        ("pictures", ctypes.c_uint64),
        ("poisoned", ctypes.c_uint64),
        ("fallbacks", ctypes.c_uint64),
        ("operators", ctypes.c_uint64),
    ]


def library_path() -> Path:
    """Where libtrivium lies: in an editable install beside the package's metadata, not beside its sources.

    Raises: FileNotFoundError where it was never built.
    """
    return find_library(__package__, "libtrivium.so")


def find_library(package: str, name: str) -> Path:
    """A library of a package's. Raises: FileNotFoundError where it was never built."""
    folders = [Path(folder) for folder in import_module(package).__path__]
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}: build and install trivium")


@cache
def library() -> ctypes.CDLL:
    """libtrivium with its functions declared. Raises: FileNotFoundError, OSError where it cannot be loaded."""
    lib = ctypes.CDLL(str(library_path()))
    lib.mcheads_create.argtypes = [
        ctypes.POINTER(_POINTER),
        *[_LONG] * 4,
        ctypes.c_float,
        _INT,
        _INT,
        *[_POINTER] * 4,
    ]
    lib.mcheads_create.restype = _INT
    lib.mcheads_destroy.argtypes = [_POINTER]
    lib.mcheads_destroy.restype = None
    lib.mcheads_scratch.argtypes = [_POINTER, _LONG, _LONG, _LONG]
    lib.mcheads_scratch.restype = _LONG
    lib.mcheads_run.argtypes = [_POINTER, _POINTER, _LONG, _LONG, *[_POINTER] * 6, _LONG, _LONG]
    lib.mcheads_run.restype = _INT
    lib.mcheads_weight_type.argtypes = [_POINTER]
    lib.mcheads_weight_type.restype = _INT
    lib.mcheads_isa.argtypes = [_POINTER]
    lib.mcheads_isa.restype = ctypes.c_char_p
    lib.mcheads_default_isa.argtypes = []
    lib.mcheads_default_isa.restype = ctypes.c_char_p
    lib.mcheads_get_counts.argtypes = [ctypes.POINTER(Counts)]
    lib.mcheads_get_counts.restype = None
    lib.mcheads_error.argtypes = []
    lib.mcheads_error.restype = ctypes.c_char_p
    return lib


def last_error() -> str:
    """The line about this thread's last failure."""
    return str(library().mcheads_error().decode())
