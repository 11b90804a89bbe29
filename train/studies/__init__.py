"""Studies: many ways to train, compared on the same data; the YAML files here are the ones that come along."""
