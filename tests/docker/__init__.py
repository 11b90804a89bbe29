"""Images and compose file without Docker: linted, checked for what they promise, and their commands carried out."""
