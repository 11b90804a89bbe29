"""Views of pictures: augmentations that training draws, corruptions that only tests and calibration see."""
