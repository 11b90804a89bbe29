"""Export: from a student checkpoint or a timm model to a verified bundle."""
