"""TensorRT without a card: fakes that compute, and checks of them and of ours against NVIDIA's own interface."""
