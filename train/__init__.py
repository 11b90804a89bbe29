"""Training: from a pretrained classifier and pictures to a three-headed robust student."""
