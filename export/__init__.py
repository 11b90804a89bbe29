"""Export: from a student checkpoint or a timm model to a verified bundle."""

import trivium.train  # noqa: F401  sets OpenMP's policy before torch is loaded
