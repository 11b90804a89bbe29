"""Which pictures a bundle's guarantees may rest on: those that neither training nor the routers' calibration saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError

from ..calibration.calibrate import drawn
from ..data.pictures import NAMED, Pictures, load_described, load_pictures, load_same, load_whole, parse_spec

CalibrationSplit = Literal["calibration", "test", "all"]


def calibration_data(
    manifest: Manifest, data: str | None, split: CalibrationSplit, say: Callable[[str], None]
) -> tuple[Pictures, NDArray[np.int64] | None]:
    """Pictures to calibrate on, and their order where not all may be used; None stands for any.

    Data that the model was trained on is parted as it was for the training, and of its calibration split only those
    pictures are used that the export's calibration of temperatures and routers left.

    Args:
        data: as parse_spec reads it; None: what the model was trained on.
        split: all is for data of which the training saw nothing.
        say: told in a line where the data is other than the training's.

    Raises: ConfigError.
    """
    record: Any = manifest.provenance.get("data")
    if not (isinstance(record, dict) and isinstance(record.get("spec"), dict)):
        record = None
    place: Literal["calibration", "test"] = "test" if split == "all" else split
    if data is None:
        if record is None or record["spec"].get("kind") not in NAMED:
            raise ConfigError("the bundle's record does not say where its data lies: name it with --data")
        own: Pictures | None = load_described(record, place, manifest.preprocessing)
    else:
        own = load_same(record, data, place, manifest.preprocessing) if record else None
    if own is None:
        assert data is not None
        say(f"data: {data} is not what the model was trained on; nothing is known of an overlap")
        spec = parse_spec(data)
        if split == "all":
            return load_whole(spec, manifest.preprocessing), None
        return load_pictures(spec, split, manifest.preprocessing), None
    if split == "all":
        raise ConfigError("--split all: most of these pictures trained the model; take calibration or test")
    if split == "test" or manifest.calibration is None:
        return own, None
    order = drawn(len(own), manifest.calibration.seed)[manifest.calibration.pictures :]
    if not len(order):
        raise ConfigError(
            f"all {len(own)} pictures of the calibration split have fitted temperatures and routers already: "
            "take --split test or other data"
        )
    return own, order
